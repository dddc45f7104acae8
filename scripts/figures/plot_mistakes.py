"""The surest mistakes of a run, as pictures with the probabilities of the wrong and of the true class.

    python scripts/figures/plot_mistakes.py RUN [--head final] [--number 24] [--output FILE.png]

A run draws its main head's 24 surest mistakes itself (`mistakes.png`); this shows other heads, or more. Reads
predictions.safetensors of the run and the images, where they still are where the run found them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dassl.evaluation.drawing import Picture
from dassl.evaluation.mistakes import SHOWN, mistakes_of, mistakes_sheet
from dassl.utils import InputError, atomic_write
from dassl.utils.cli import fail, run_main
from scripts.figures.command import open_predictions


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--head", default="", help="whose mistakes (default: the head that is the method's accuracy)")
    parser.add_argument("--number", type=int, default=SHOWN, help=f"how many are drawn (default: {SHOWN})")
    parser.add_argument("--output", type=Path, help="file to write (default: RUN/figures/mistakes.png)")
    args = parser.parse_args(argv)
    try:
        if args.number < 1:
            raise InputError(f"Expected --number to be at least 1 but got {args.number}")
        mistakes = mistakes_of(open_predictions(args.run), args.head)
        if not mistakes:
            raise InputError(f"Expected mistakes to draw but {args.run} has made none")
        folder = args.run if args.run.is_dir() else args.run.parent
        path = args.output or folder / "figures" / "mistakes.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as stream:
            stream.write(Picture(mistakes_sheet(mistakes, args.number)).png)
    except (ValueError, OSError) as error:
        return fail(error)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

"""Time the way from a folder of photos to a saved classifier: ten handwritten digits, twenty photos of each.

    python benchmarks/own_photos.py --threads 2

Each row is one step of docs/OWN_PHOTOS.md, with the bundled tiny CLIP. Nothing is known of the photos before. The last
row classifies other photos, whose accuracy is shown.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 128  # pixels of a photo's side


def write_photos(folder: Path, photos: int, skipped: int = 0) -> None:
    """Write that many PNG files of each digit, in a folder for each, after the first `skipped` ones."""
    digits = load_digits()
    for number, name in enumerate(NAMES):
        place = folder / name
        place.mkdir(parents=True)
        found = digits.images[digits.target == number][skipped : skipped + photos]
        for row, image in enumerate(found):
            pixels = Image.fromarray((255 - image * (255 / 16)).astype(np.uint8), "L")
            pixels.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB").save(place / f"{row:03d}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=20, help="of each class (default: 20)")
    parser.add_argument("--threads", type=int, default=2, help="of the processor (default: 2)")
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # torch is not imported yet
    rows: list[list[str]] = []

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        rows.append([name, f"{time.perf_counter() - began:.1f}"])

    with tempfile.TemporaryDirectory() as temporary:
        folder, others = Path(temporary, "my_photos"), Path(temporary, "others")
        write_photos(folder, args.photos)
        write_photos(others, 10, skipped=args.photos)
        os.environ["DLR_CLIP_CACHE"] = str(Path(temporary, "cache"))  # no features of an earlier call
        with timed("import"):
            from trainers import FewShotClassifier
        with timed(f"fit(folder): {len(NAMES)} x {args.photos} photos, method chosen"):
            classifier = FewShotClassifier(backbone="tiny").fit(folder)
        with timed("report()"):
            report = str(classifier.report())
        with timed("inspect(file=...)"):
            classifier.inspect(file=Path(temporary, "inspect.html"))
        with timed("save(file)"):
            classifier.save(Path(temporary, "my_photos.safetensors"))
        with timed("load(file)"):
            classifier = FewShotClassifier.load(Path(temporary, "my_photos.safetensors"))
        paths = sorted(others.glob("*/*.png"))
        with timed(f"predict: {len(paths)} photos"):
            answers = classifier.predict(list(map(str, paths)))
    right = np.mean([answer == path.parent.name for answer, path in zip(answers, paths, strict=True)])
    print(report)
    print(tabulate([*rows, ["all", f"{sum(float(row[1]) for row in rows):.1f}"]], ["step", "seconds"]))
    print(f"{100 * right:.1f} % of {len(paths)} other photos right")
    return 0


if __name__ == "__main__":
    sys.exit(main())

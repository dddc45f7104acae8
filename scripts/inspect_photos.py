"""Show what is wrong with photos: mistakes, doubtful labels, near-duplicates, broken files, as one HTML page.

    python scripts/inspect_photos.py RUN_OR_FILE [--images FOLDER] [--output inspect.html]

RUN_OR_FILE is the output folder of a run, whose photos have to be where they were, or a file that
FewShotClassifier.save has written, with --images. A folder of images has a folder for each class; all of its photos
count as test photos, unless it says itself what is train and test.

The page needs nothing beside itself: thumbnails are inside. Exit codes: 0 done; 2 something given was wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.utils import atomic_write
from dassl.utils.cli import SETUP_ERRORS, fail, given_wrongly, run_main
from trainers.api.inspect_page import Page
from trainers.api.inspecting import inspect_model


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="RUN_OR_FILE", help="output folder of a run, or a saved classifier")
    parser.add_argument("--images", help="folder (or CSV file) of images instead of the run's own")
    parser.add_argument(
        "--output", type=Path, default=Path("inspect.html"), help="file to write (default: inspect.html)"
    )
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    args = parser.parse_args(argv)
    try:
        found, title = inspect_model(args.model, args.images or "", "cpu" if args.cpu else "auto")
        with atomic_write(args.output) as stream:
            stream.write(Page(found, title).html())
    except SETUP_ERRORS as error:
        if given_wrongly(error):
            return fail(error)
        raise
    if found.leaks:
        print(
            f"WARNING: {len(found.leaks)} test photos, or copies of them, are among the training photos",
            file=sys.stderr,
        )
    print(
        f"{len(found.mistakes)} mistakes of {found.judged} photos, {len(found.doubts)} doubtful labels, "
        f"{len(found.twins)} near-duplicates, {len(found.broken)} broken files, {len(found.tiny)} tiny photos"
    )
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

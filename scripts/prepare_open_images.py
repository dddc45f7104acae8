"""Turn Open Images' official CSV files into the one label per image that the dataset OpenImages reads.

    python scripts/prepare_open_images.py --root ~/data \
        --labels oidv7-train-annotations-human-imagelabels.csv --classes oidv7-class-descriptions.csv

Images lie in ROOT/open_images/images (or --images-path, which is then linked from there); ROOT/open_images/labels.csv
is written. Of an image's labels that people confirmed (Confidence 1), the one that the fewest images have is taken: the
most specific. Classes with fewer than --min-images images are left out, and so are images that are not there.

Exit codes: 0 done; 2 something given was wrong.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.utils import InputError
from dassl.utils.cli import fail, run_main
from trainers.app.data import open_images


def rows_of(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of these columns, row by row; the files have millions of rows."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if not set(columns) <= set(header):
                raise InputError(
                    f"Expected {path} to have the columns {', '.join(columns)} but got {', '.join(header)}"
                )
            places = [header.index(column) for column in columns]
            for row in reader:
                if len(row) <= max(places):
                    raise InputError(
                        f"Expected line {reader.line_num} of {path} to have {len(header)} cells but got {row}"
                    )
                yield tuple(row[place].strip() for place in places)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"Expected {path} to be a readable CSV file in UTF-8 but got: {error}") from error


def one_label_each(confirmed: Mapping[str, Sequence[str]], min_images: int = 1) -> dict[str, str]:
    """Return image id -> its rarest label; of equally rare labels, the first in the alphabet is taken.

    Args:
        confirmed: image id -> labels that people confirmed.
        min_images: labels that fewer images would end up with are dropped, with their images.
    """
    counts = Counter(label for labels in confirmed.values() for label in set(labels))
    chosen = {key: min(labels, key=lambda label: (counts[label], label)) for key, labels in confirmed.items() if labels}
    final = Counter(chosen.values())
    return {key: label for key, label in chosen.items() if final[label] >= min_images}


def run(args: argparse.Namespace) -> str:
    """Write labels.csv; return what to say about it."""
    folder = Path(args.root).expanduser().absolute() / "open_images"
    images = folder / "images"
    if args.images_path:
        given = Path(args.images_path).expanduser().absolute()
        if not given.is_dir():
            raise InputError(f"Expected --images-path to be the folder of the images but {given} is no folder")
        folder.mkdir(parents=True, exist_ok=True)
        if not images.exists():
            images.symlink_to(given, target_is_directory=True)
    if not images.is_dir():
        raise InputError(f"Expected the images in {images} but there is no such folder: --images-path names another")
    there = open_images.find_images(images)
    names = {label: name for label, name in rows_of(args.classes, ("LabelName", "DisplayName"))}
    confirmed: dict[str, list[str]] = {}
    for key, label, confidence in rows_of(args.labels, ("ImageID", "LabelName", "Confidence")):
        if key in there and label in names and float(confidence or 0) == 1:
            confirmed.setdefault(key, []).append(names[label])
    chosen = one_label_each(confirmed, args.min_images)
    if not chosen:
        raise InputError(
            f"Expected images with confirmed labels but of the {len(there)} images in {images} none is left: "
            f"{len(confirmed)} are in {args.labels}"
        )
    with open(folder / open_images.LABELS, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(open_images.COLUMNS)
        writer.writerows(sorted(chosen.items()))
    return f"{len(chosen)} of {len(there)} images in {len(set(chosen.values()))} classes: {folder / open_images.LABELS}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", required=True, help="folder that holds open_images")
    parser.add_argument("--labels", required=True, type=Path, help="CSV with ImageID, LabelName, Confidence")
    parser.add_argument("--classes", required=True, type=Path, help="CSV with LabelName, DisplayName")
    parser.add_argument("--images-path", help="folder of the images, where it is not ROOT/open_images/images")
    parser.add_argument("--min-images", type=int, default=10, help="least images of a class (default: 10)")
    args = parser.parse_args(argv)
    try:
        print(run(args))
    except (InputError, ValueError) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

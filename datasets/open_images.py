"""OpenImages: a generic image set to train the adapters of IMO and IMODINO on.

    open_images/
        labels.csv              columns ImageID, LabelName (a class's name), one row per image
        images/<ImageID>.jpg    or in folders below, such as images/train_0/<ImageID>.jpg

`scripts/prepare_open_images.py` makes `labels.csv` from the official class descriptions and human-verified labels, for
the images that are there. Train, val and test are 90 / 5 / 5 % of each class, drawn once.
"""

from __future__ import annotations

import csv
import os
import random
from pathlib import Path

from dassl.data.datasets import DATASET_REGISTRY, Datum
from dassl.utils import InputError

from .files import IMAGE_EXTENSIONS, check_name
from .split_dataset import SplitDataset
from .splits import SPLIT_SEED, Split

LABELS = "labels.csv"
COLUMNS = ("ImageID", "LabelName")
HELD_OUT = 0.05  # share of a class's images for val, and the same for test


def find_images(folder: str | Path) -> dict[str, str]:
    """Find all images below `folder`: id (file name without extension) -> path relative to `folder`.

    Raises:
        InputError: two files have the same id.
    """
    found: dict[str, str] = {}
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            stem, extension = os.path.splitext(name)
            if extension.lower() not in IMAGE_EXTENSIONS or name.startswith("."):
                continue
            path = Path(place, name).relative_to(folder).as_posix()
            if stem in found:
                raise InputError(f"Expected one image of the id {stem} in {folder} but got {found[stem]} and {path}")
            found[stem] = path
    return found


def read_labels(path: str | Path) -> dict[str, str]:
    """Read image id -> class name from a CSV file, in the order of the file.

    Raises:
        InputError: the file is unreadable, a column or cell is missing, or an id is there twice. The message names the
            line.
    """
    labels: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if not set(COLUMNS) <= set(reader.fieldnames or ()):
                raise InputError(
                    f"Expected {path} to have the columns {' and '.join(COLUMNS)} but got {reader.fieldnames}"
                )
            for row in reader:
                key, name = ((row.get(column) or "").strip() for column in COLUMNS)
                if not key or not name or "/" in key:
                    raise InputError(
                        f"Expected line {reader.line_num} of {path} to have an id and a label but got {row}"
                    )
                if key in labels:
                    raise InputError(
                        f"Expected {path} to list each image once but line {reader.line_num} repeats {key}"
                    )
                labels[key] = name
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"Expected {path} to be a readable CSV file in UTF-8 but got: {error}") from error
    return labels


@DATASET_REGISTRY.register()
class OpenImages(SplitDataset):
    """Read images of Open Images' layout as a dataset; see the head of this file.

    Classes are numbered in the order of their names.
    """

    folder = "open_images"
    sources = (LABELS, "images")

    def make_split(self) -> Split:
        table = Path(self.dataset_dir, LABELS)
        labels, images = read_labels(table), find_images(self.image_dir)
        absent = [key for key in labels if key not in images]
        if absent:
            raise InputError(
                f"Expected the images of {table} in {self.image_dir} but {len(absent)} of {len(labels)} are missing, "
                f"such as {absent[0]}: make {LABELS} anew with scripts/prepare_open_images.py, or fetch them"
            )
        names = sorted(set(labels.values()))
        by_label: dict[int, list[Datum]] = {label: [] for label in range(len(names))}
        position = {name: label for label, name in enumerate(names)}
        for key in sorted(labels):
            name = labels[key]
            check_name(name, str(table))
            by_label[position[name]].append(Datum(f"{self.image_dir}/{images[key]}", position[name], classname=name))
        rng, split = random.Random(SPLIT_SEED), Split([], [], [])
        for data in by_label.values():
            rng.shuffle(data)
            count = max(1, round(HELD_OUT * len(data))) if len(data) > 2 else 0
            split.val.extend(data[:count])
            split.test.extend(data[count : 2 * count])
            split.train.extend(data[2 * count :])
        return split

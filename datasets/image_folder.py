"""ImageFolder: your own images, as a folder with one folder per class, or as a CSV file.

    my_photos/cat/*.jpg  my_photos/dog/*.jpg  ...            a split is drawn
    my_photos/train/cat/*.jpg  my_photos/test/cat/*.jpg      the split is that of the folders (layout.py)
    my_photos.csv with the columns path, label[, split]      paths are relative to the CSV's folder

`--root` is the folder (or the CSV) itself. Classes are called like their folders (in a CSV: like their labels), or as
`classes.txt` / `classes.json` beside them says. Parts of the split that are not given are drawn once, with a fixed
seed, and kept as `split.json` beside the images (in the user's cache folder if that cannot be written). If no part is
given, train / val / test are 50 / 20 / 30 % of each class; if only some parts are given, a missing val is 20 % and a
missing test 30 % of train.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dassl.data.datasets import DATASET_REGISTRY, Datum
from dassl.data.datasets.base_dataset import find_missing
from dassl.utils import InputError, did_you_mean, place_name

from .files import check_name, read_lines
from .layout import PARTS, Photo, describe, scan_folder
from .split_dataset import SplitDataset
from .splits import SPLIT_SEED, Split, cut_shares, relative_items

logger = logging.getLogger(__name__)

TEST_SHARE, VAL_SHARE = 0.3, 0.2  # shares of a class's training images, for a part that is not given
MIN_IMAGES = 4  # per class, to draw train, val and test from
CSV_NAME = "labels.csv"  # in a folder, stands for --root FOLDER/labels.csv
SEPARATORS = " \t:=,;"  # between folder and name in classes.txt


def read_csv(path: Path) -> list[Photo]:
    """Read the rows of a CSV file with the columns path, label and, if wanted, split, in file order.

    A split is train, val or test (or a synonym). Commas, semicolons or tabs may separate the columns; further
    columns are ignored.

    Raises:
        InputError: no such file, not CSV, a column or a cell is missing, an image is outside the CSV's folder or is
            listed twice, an unknown split. The message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"Expected {path} to be a readable CSV file in UTF-8 but got: {reason}") from error
    header = text.split("\n", 1)[0]
    reader = csv.DictReader(io.StringIO(text), delimiter=next((c for c in ";\t" if c in header), ","), strict=True)
    photos: dict[str, Photo] = {}
    try:
        reader.fieldnames = columns = [name.strip().lower() for name in reader.fieldnames or ()]
        if len(set(columns)) < len(columns):
            raise InputError(f"Expected {path} to have each column once but got {', '.join(columns)}")
        if not {"path", "label"} <= set(columns):
            got = ", ".join(columns) or "none"
            raise InputError(f"Expected {path} to have the columns path and label but got {got}")
        for row in reader:
            photo = _photo(row, f"{path}, line {reader.line_num},", path.parent)
            if photo.path in photos:
                raise InputError(
                    f"Expected {path} to list each image once but line {reader.line_num} repeats {photo.path}"
                )
            photos[photo.path] = photo
    except csv.Error as error:
        raise InputError(f"Expected {path} to be CSV but got: {error} in line {reader.line_num}") from error
    parts = {photo.part for photo in photos.values()}
    if "" in parts and len(parts) > 1:
        bare = next(photo.path for photo in photos.values() if not photo.part)
        raise InputError(f"Expected {path} to give a split for all images or for none but {bare} has none")
    return list(photos.values())


def _photo(row: Mapping[Any, Any], where: str, folder: Path) -> Photo:
    values = {name: (row.get(name) or "").strip() for name in ("path", "label", "split")}
    for name in ("path", "label"):
        if not values[name]:
            raise InputError(f"Expected {where} to have a {name} but it is empty")
    if row.get(None):
        raise InputError(f"Expected {where} to have as many cells as the header but got {row[None]} beside")
    absolute = os.path.normpath(folder / values["path"])  # an absolute path in the CSV replaces the folder
    if not absolute.startswith(f"{folder}{os.sep}"):
        raise InputError(f"Expected {where} to name an image below {folder} but got {values['path']}")
    part = values["split"].lower()
    if part and part not in PARTS:
        raise InputError(f"Expected {where} to have the split train, val or test but got {values['split']!r}")
    return Photo(Path(absolute).relative_to(folder).as_posix(), values["label"], PARTS.get(part, ""))


# ------------------------------------------------------------------------------------------------- class names


def class_names(folder: Path, keys: Sequence[str]) -> dict[str, str]:
    """Return the names of the classes: key (folder, or label in the CSV) -> name.

    `classes.json` in `folder` is an object {key: name}, or a list of names in the order of the keys. `classes.txt` has
    lines "key name" (or "key: name", "key = name", "key, name"), or one name per line in the order of the keys. Keys
    that are not mentioned are their own names.

    Raises:
        InputError: the file is malformed or names a class that is not there, a name is empty, or two classes would have
            the same prompt.
    """
    files = [path for path in (folder / "classes.json", folder / "classes.txt") if path.exists()]
    if len(files) > 1:
        raise InputError(f"Expected one of {files[0]} and {files[1]} but got both")
    given = {} if not files else _from_json(files[0], keys) if files[0].suffix == ".json" else _from_txt(files[0], keys)
    names = {key: given.get(key, key) for key in keys}
    same: dict[str, str] = {}
    for key, name in names.items():
        if not name.strip():
            raise InputError(f"Expected the class {key} in {folder} to have a name but got {name!r}")
        check_name(name, str(folder))
        prompt = " ".join(name.replace("_", " ").lower().split())  # CLIP reads no case and no underscores
        twin = same.setdefault(prompt, key)
        if twin != key:
            raise InputError(
                f"Expected class names that CLIP can tell apart but the classes {twin} and {key} in {folder} are "
                f"both called {prompt!r}"
            )
    return names


def _from_json(path: Path, keys: Sequence[str]) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=partial(_once, path))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"Expected {path} to be a readable JSON file but got: {error}") from error
    values = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(f"Expected {path} to be an object {{folder: name}} or a list of names but got something else")
    if isinstance(content, list):
        return _in_order(path, values, keys)
    for key in content:
        _check_key(path, key, keys)
    return content


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise InputError(f'Expected {path} to name each class once but "{twice}" stands twice')
    return found


def _from_txt(path: Path, keys: Sequence[str]) -> dict[str, str]:
    lines = read_lines(path)
    found = [(line, _leading_key(line, keys)) for line in lines]
    if not any(key for _, key in found) and len(lines) == len(keys):
        return _in_order(path, lines, keys)
    names: dict[str, str] = {}
    for line, key in found:
        if key is None:
            _check_key(path, line, keys)
        elif key in names:
            raise InputError(f"Expected {path} to name the class {key} once but got a second line: {line}")
        else:
            names[key] = line[len(key) :].lstrip(SEPARATORS) or key
    return names


def _leading_key(line: str, keys: Sequence[str]) -> str | None:
    fits = [key for key in keys if line == key or (line.startswith(key) and line[len(key)] in SEPARATORS)]
    return max(fits, key=len, default=None)


def _in_order(path: Path, names: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    if len(names) != len(keys):
        raise InputError(f"Expected {path} to have {len(keys)} names, one per class, but got {len(names)}")
    logger.info(f"Class names of {path}: {', '.join(f'{key} = {n}' for key, n in zip(keys, names, strict=True))}")
    return dict(zip(keys, names, strict=True))


def _check_key(path: Path, key: str, keys: Sequence[str]) -> None:
    if key not in keys:
        some = ", ".join(keys[:10]) + (", ..." if len(keys) > 10 else "")
        raise InputError(
            f'Expected {path} to name classes that are there ({some}) but got "{key}"{did_you_mean(key, keys)}'
        )


# ----------------------------------------------------------------------------------------------------- splitting


def draw_parts(split: Split, seed: int = SPLIT_SEED) -> Split:
    """Fill the empty parts of a split from train: test first (TEST_SHARE of each class), then val (VAL_SHARE).

    Classes with fewer than MIN_IMAGES training images give none away.
    """
    rng = random.Random(seed)
    parts = split._asdict()
    for part, share in (("test", TEST_SHARE), ("val", VAL_SHARE)):
        if parts[part]:
            continue
        by_label: dict[int, list[Datum]] = {}
        for item in parts["train"]:
            by_label.setdefault(item.label, []).append(item)
        parts["train"] = []
        for data in by_label.values():
            rng.shuffle(data)
            count = round(share * len(data)) if len(data) >= MIN_IMAGES else 0
            parts[part] = parts[part] + data[:count]
            parts["train"] += data[count:]
    return Split(**parts)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # a link that leads nowhere, with --skip-bad-images
        return -1


@DATASET_REGISTRY.register()
class ImageFolder(SplitDataset):
    """Read one's own images, from folders or a CSV file, as a dataset; see the head of this file."""

    folder = images = ""  # the root itself

    def locate(self, root: str) -> Path:
        if not root:
            raise InputError("Expected --root (or DATASET.ROOT) to be the folder of your images but none was given")
        path = Path(os.path.abspath(os.path.expanduser(root)))
        self.shown_name = place_name(path)
        if path.is_dir():
            self.table = path / CSV_NAME if (path / CSV_NAME).is_file() else None
            if self.table is not None:
                logger.info(f"Taking the images and classes that {self.table} lists")
            return path
        if not path.exists():
            raise InputError(f"Expected --root to be the folder of your images, or a CSV file, but {path} is not there")
        if path.suffix.lower() != ".csv":
            raise InputError(f"Expected --root to be the folder of your images, or a CSV file, but got {path}")
        self.table = path
        return path.parent

    def _load_split(self) -> Split:
        self.photos = scan_folder(self.dataset_dir) if self.table is None else read_csv(self.table)
        if self.table is not None and self.table.name != CSV_NAME:
            self.split_name = f"{self.table.stem}.split.json"  # type: ignore[misc]  # not the class's: this root's
        if {photo.part for photo in self.photos} >= {"train", "val", "test"}:
            self.split_name = ""  # type: ignore[misc]  # nothing to draw: folders or CSV are the split
            self.missing_hint = ""
        else:
            self.missing_hint = f" (to split anew what is there, delete {self.dataset_dir}/{self.split_name})"
        keys = {photo.key for photo in self.photos if photo.part in ("", "train")}
        numbers = self.table is not None and all(key.isdecimal() for key in keys)
        self.keys = sorted(keys, key=int) if numbers else sorted(keys)
        if len(self.keys) < 2:
            raise InputError(f"Expected {self._source()} to have two classes or more but got {len(self.keys)}")
        names = class_names(Path(self.dataset_dir), self.keys)
        self._classes = {key: (label, names[key]) for label, key in enumerate(self.keys)}
        for photo in self.photos:
            if photo.key not in self._classes:
                hint = did_you_mean(photo.key, self.keys)
                raise InputError(
                    f"Expected the classes of {photo.part} in {self._source()} to be those of train but got "
                    f'"{photo.key}"{hint}'
                )
        split = super()._load_split()
        self._compare(split)
        counts = {name: Counter[str]() for name in self._classes.values()}
        for part, data in zip(Split._fields, split, strict=True):
            for item in data:
                counts[item.label, item.classname][part] += 1
        logger.info(describe(self.photos, self._source(), [(name, found) for (_, name), found in counts.items()]))
        return split

    def bind_data(self, split: Split) -> str:
        """Return a digest of the split and the files' sizes, to tell apart two folders with the same file names."""
        sizes = [_size(item.impath) for part in split for item in part]
        return hashlib.sha256(f"{self.split_digest} {sizes}".encode()).hexdigest()

    def _source(self) -> str:
        return str(self.table or self.dataset_dir)

    def make_split(self) -> Split:
        parts: dict[str, list[Datum]] = {"": [], "train": [], "val": [], "test": []}
        for photo in self.photos:
            label, name = self._classes[photo.key]
            parts[photo.part].append(Datum(f"{self.dataset_dir}/{photo.path}", label, classname=name))
        missing = find_missing(item.impath for data in parts.values() for item in data) if self.check_files else []
        if missing:  # raised before an unusable split is saved
            raise InputError(
                f"Expected the images of {self._source()} to exist but {len(missing)} of {len(self.photos)} do not: "
                f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
            )
        everything = parts.pop("")
        if not everything:
            return draw_parts(Split(**parts))
        by_label: dict[int, list[Datum]] = {label: [] for label in range(len(self.keys))}
        for item in everything:
            by_label[item.label].append(item)
        short = [f"{self.keys[label]} ({len(data)})" for label, data in by_label.items() if len(data) < MIN_IMAGES]
        if short:
            raise InputError(
                f"Expected at least {MIN_IMAGES} images of each class in {self._source()}, to make train, val and test "
                f"of, but got {', '.join(short[:10])}{', ...' if len(short) > 10 else ''}. Add images or leave these "
                "classes out, or make the split yourself: folders train, val and test, or a CSV with a split column"
            )
        rng, split = random.Random(SPLIT_SEED), Split([], [], [])
        for label, data in by_label.items():
            rng.shuffle(data)
            cut_shares(data, split, self.keys[label])
        return split

    def _compare(self, split: Split) -> None:
        """Check that a split that was made earlier still fits the images that are there now.

        Classes that differ are an InputError; new images are left out with a warning.
        """
        now = {photo.path: self._classes[photo.key] for photo in self.photos}
        known = {path: (label, name) for part in split for path, label, name in relative_items(part, self.dataset_dir)}
        new = [path for path in now if path not in known]
        changed = next((path for path in known if now.get(path, known[path]) != known[path]), None)
        changed = changed or next((path for path in new if now[path] not in known.values()), None)
        if changed is not None:
            was = f"{known[changed][1]!r} (label {known[changed][0]})" if changed in known else "in none of its classes"
            raise InputError(
                f"Expected {self.split_name} to fit the classes in {self._source()} but there {changed} is {was} and "
                f"now it is {now[changed][1]!r} (label {now[changed][0]}). Delete {self.split_name} to split anew"
            )
        if new:
            logger.warning(
                f"{len(new)} images in {self._source()} are not in {self.split_name}, which was made before, and are "
                f"left out: {', '.join(new[:3])}{', ...' if len(new) > 3 else ''}. Delete it to split anew"
            )

    def _pick(self, split: Split, shots: int, *rest: Any) -> tuple[list[Datum], list[Datum]]:
        # The number of shots usually comes from the trainer's config, which cannot know how many photos there are.
        largest = max(Counter(item.label for item in split.train).values())
        if shots > largest:
            logger.warning(
                f"DATASET.NUM_SHOTS is {shots} but no class has more than {largest} training images: all are used"
            )
        return super()._pick(split, min(shots, largest), *rest)

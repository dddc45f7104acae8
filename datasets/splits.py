"""Read and write split files, split datasets that have no published file, and cut class lists into base and new."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dassl.data.datasets import Datum
from dassl.utils import InputError, atomic_write

from .files import check_name, list_folders, list_images

logger = logging.getLogger(__name__)
SPLIT_SEED = 0  # seed of the splitters: a split belongs to the dataset, not to a run, so cfg.SEED does not change it


class Split(NamedTuple):
    """The three lists of a dataset, in file order."""

    train: list[Datum]
    val: list[Datum]
    test: list[Datum]


def read_split(path: str | Path, image_dir: str | Path) -> Split:
    """Read a split JSON: `{"train": [[relative path, label, class name], ...], "val": ..., "test": ...}`.

    Paths are relative to `image_dir` and written with `/`. Order and class names are kept as they are in the file.

    Raises:
        InputError: an unreadable file, a malformed entry, an absolute path or one that leaves `image_dir`, an image
            listed twice, labels with a gap, one label with two names, an empty `train` or `test`. The message names the
            file and the entry. Two labels with one name are fine: classes are told apart by label.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Expected {path} to be a readable split file but got: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # malformed JSON, not UTF-8, nested without end
        raise InputError(f"Expected {path} to be a JSON split file but got: {error}") from error
    missing = [part for part in Split._fields if not isinstance(content, dict) or part not in content]
    if missing:
        raise InputError(f"Expected {path} to be an object with lists train, val and test but {missing[0]} is absent")
    lists = {part: _read_items(f"{path}: {part}", content[part], str(image_dir)) for part in Split._fields}
    split = Split(**lists)
    _check_classes(str(path), split)
    return split


def _read_items(where: str, items: Any, image_dir: str) -> list[Datum]:
    if not isinstance(items, list):
        raise InputError(f"Expected {where} to be a list but got {type(items).__name__}")
    data = []
    for number, item in enumerate(items):
        if not (isinstance(item, list) and len(item) == 3 and isinstance(item[0], str) and isinstance(item[2], str)):
            raise InputError(f"Expected {where}[{number}] to be [path, label, class name] but got {_brief(item)}")
        relative, label, name = item
        if isinstance(label, str) and label.isdecimal():
            label = int(label)
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise InputError(f"Expected {where}[{number}] to have an integer label >= 0 but got {_brief(label)}")
        if not relative or relative[0] in "/\\" or (".." in relative and ".." in relative.split("/")):
            raise InputError(f"Expected {where}[{number}] to have a path inside {image_dir} but got {relative!r}")
        if not name.strip():
            raise InputError(f"Expected {where}[{number}] to have a class name but got {name!r}")
        if not (relative.isascii() and name.isascii()):
            check_name(relative, f"{where}[{number}]")
            check_name(name, f"{where}[{number}]")
        data.append(Datum(impath=f"{image_dir}/{relative}", label=label, classname=name))
    return data


def _check_classes(where: str, split: Split) -> None:
    for part in ("train", "test"):
        if not getattr(split, part):
            raise InputError(f"Expected {where} to have images in {part} but it is empty")
    names: dict[int, str] = {}
    seen: set[str] = set()
    for item in itertools.chain(*split):
        name = names.setdefault(item.label, item.classname)
        if name != item.classname:
            raise InputError(
                f"Expected {where} to give label {item.label} one class name but got {name!r} and {item.classname!r}"
            )
        seen.add(item.impath)
    if len(seen) < sum(map(len, split)):
        _name_twins(where, split)
    trained = {item.label for item in split.train}
    highest = max(names)
    if len(trained) <= highest:
        gap = next(label for label in itertools.count() if label not in trained)
        raise InputError(
            f"Expected {where} to have training images for every label from 0 to {highest} but label {gap} has none "
            f"({highest + 1 - len(trained)} such labels)"
        )


def _name_twins(where: str, split: Split) -> None:
    # An image in two parts would be a test image that was trained on.
    part_of: dict[str, str] = {}
    for part in Split._fields:
        for item in getattr(split, part):
            if item.impath in part_of:
                raise InputError(
                    f"Expected {where} to list each image once but {item.impath} is in {part_of[item.impath]} and "
                    f"in {part}" + (" (twice)" if part_of[item.impath] == part else "")
                )
            part_of[item.impath] = part


def write_split(path: str | Path, image_dir: str | Path, split: Split) -> None:
    """Write a split JSON (the form that `read_split` reads and CoOp wrote), completely or not at all."""
    content = {part: relative_items(getattr(split, part), image_dir) for part in Split._fields}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(str(path)) as file:
        json.dump(content, file, indent=4, separators=(",", ": "))


def relative_items(data: Iterable[Datum], image_dir: str | Path) -> list[list[Any]]:
    """Convert items to `[path relative to image_dir, label, class name]`, the form that files keep.

    Raises:
        InputError: an image lies outside `image_dir`.
    """
    prefix = f"{image_dir}/"
    items = []
    for item in data:
        if not item.impath.startswith(prefix):
            raise InputError(f"Expected every image to lie inside {image_dir} but got {item.impath}")
        items.append([item.impath[len(prefix) :], item.label, item.classname])
    return items


def split_digest(split: Split, image_dir: str | Path) -> str:
    """Compute the SHA-256 (hex) of a split's relative paths, labels and names in order.

    The digest is the same wherever the images lie.
    """
    return _digest([relative_items(part, image_dir) for part in split])


def _digest(content: list[list[list[Any]]]) -> str:
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def split_by_folder(
    image_dir: str | Path,
    ignored: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
    seed: int = SPLIT_SEED,
    p_train: float = 0.5,
    p_val: float = 0.2,
) -> Split:
    """Split each class of a tree with one folder per class: by default 50 / 20 / 30 %.

    Label = rank of the folder's name among the sorted names that are not `ignored` (code-point order: upper case
    first); `renamed` maps folder names to class names and does not change the order. Per class the sorted files are
    shuffled, then cut at round(p_train n) and round(p_val n), halves to even, as the published splits were cut.
    CoOp shuffles an unsorted directory listing; sorting it makes the result the same on every machine.

    Hidden entries, files beside the class folders, and files in them that are no images (by extension) do not count.

    Raises:
        InputError: the folder is missing or has no class folder, or a class has too few images for three non-empty
            parts.
    """
    image_dir = str(image_dir)
    renamed = renamed or {}
    classes = [name for name in list_folders(image_dir) if name not in ignored]
    if not classes:
        raise InputError(f"Expected {image_dir} to have one folder per class but it has none")
    rng = random.Random(seed)
    split = Split([], [], [])
    for label, folder in enumerate(classes):
        paths = [f"{image_dir}/{folder}/{name}" for name in list_images(f"{image_dir}/{folder}")]
        rng.shuffle(paths)
        data = [Datum(impath=path, label=label, classname=renamed.get(folder, folder)) for path in paths]
        cut_shares(data, split, f"{image_dir}/{folder}", p_train, p_val)
    return split


def cut_shares(data: Sequence[Datum], split: Split, where: str, p_train: float = 0.5, p_val: float = 0.2) -> None:
    """Append one class's shuffled images to the parts of `split`: round(p_train n), round(p_val n), the rest."""
    n_train, n_val = round(p_train * len(data)), round(p_val * len(data))
    if min(n_train, n_val, len(data) - n_train - n_val) <= 0:
        raise InputError(f"Expected {where} to have images enough for train, val and test but got {len(data)}")
    split.train.extend(data[:n_train])
    split.val.extend(data[n_train : n_train + n_val])
    split.test.extend(data[n_train + n_val :])


def split_trainval(
    trainval: Sequence[Datum], p_val: float = 0.2, seed: int = SPLIT_SEED
) -> tuple[list[Datum], list[Datum]]:
    """Cut an official train+val list into train and val.

    Each class, in order of first appearance, is shuffled; the first `p_val` of its images are val.

    Raises:
        InputError: a class has too few images to give one to each part.
    """
    rng = random.Random(seed)
    train: list[Datum] = []
    val: list[Datum] = []
    by_label: dict[int, list[Datum]] = {}
    for item in trainval:
        by_label.setdefault(item.label, []).append(item)
    for data in by_label.values():
        n_val = round(p_val * len(data))
        if not 0 < n_val < len(data):
            raise InputError(
                f"Expected class {data[0].classname!r} to have images enough for train and val but got {len(data)}"
            )
        rng.shuffle(data)
        val.extend(data[:n_val])
        train.extend(data[n_val:])
    return train, val


def subsample_classes(*lists: Sequence[Datum], subsample: str) -> list[list[Datum]]:
    """Keep the base or the new half of the classes in every list and number them from 0.

    The classes are the labels of the first list: base = the first ceil(n / 2) of them in label order, new = the rest.
    `subsample="all"` keeps everything. Classes are told apart by label, so two that share a name stay
    apart.

    Raises:
        InputError: `subsample` is none of all, base, new.
    """
    if subsample not in ("all", "base", "new"):
        raise InputError(f"Expected DATASET.SUBSAMPLE_CLASSES to be all, base or new but got {subsample!r}")
    if subsample == "all":
        return [list(data) for data in lists]
    logger.info(f"SUBSAMPLE {subsample.upper()} CLASSES!")
    labels = sorted({item.label for item in lists[0]})
    middle = -(-len(labels) // 2)
    selected = labels[:middle] if subsample == "base" else labels[middle:]
    if not selected:
        raise InputError(f"Expected at least two classes for SUBSAMPLE_CLASSES {subsample} but got {len(labels)}")
    rank = {label: new for new, label in enumerate(selected)}
    return [
        [
            Datum(impath=item.impath, label=rank[item.label], classname=item.classname)
            for item in data
            if item.label in rank
        ]
        for data in lists
    ]

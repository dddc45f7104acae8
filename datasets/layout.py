"""Recognize how people lay out their images: one folder per class, or parts of a split (train, val, test) above those.

The layout decides what the classes are called: after a wrong guess, a run trains on "Training" against "Testing".
Folders are therefore recognized as parts by synonyms in upper or lower case, and an ambiguous layout is refused.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dassl.utils import InputError

from .files import list_folders, list_images, list_images_below, tell_kinds

logger = logging.getLogger(__name__)

# What people call the parts of a split, in folder names and in the column "split" of a CSV.
PARTS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
# Words that may stand beside a part's name: "training_set", "Test Images". Other words ("seg_train") must be shared by
# the sibling folders.
FILLERS = frozenset(("set", "sets", "data", "dataset", "image", "images", "img", "imgs", "split", "folder", "photos"))
NOT_CLASSES = ("split_fewshot",)  # few-shot picks of ours
UNDERSTOOD_CLASSES = 20  # at most so many classes are listed one by one when the layout is told


class Photo(NamedTuple):
    """An image with the class and the part of the split that it was found in."""

    path: str  # relative to the dataset's folder, with "/"
    key: str  # its class's folder, or label in the CSV
    part: str  # train, val or test; "": not said


def scan_folder(root: str | Path) -> list[Photo]:
    """List the images below `root`, in either layout, sorted by folder.

    Raises:
        InputError: no class folder, a class folder without images, links that go around in a circle, or a layout that
            can be read in two ways; the message says how the layout was understood.
    """
    root = str(root)
    folders = [name for name in list_folders(root) if name not in NOT_CLASSES]
    if not folders:
        found = len(list_images(root))
        beside = f"{found} images that are in none" if found else "nothing"
        raise InputError(f"Expected {root} to have one folder of images per class but got {beside}")
    stray = list_images(root)
    if stray:
        logger.warning(f"Left out {len(stray)} images beside the folders in {root}: {_some(stray)}")
    parts = read_parts(root, folders)
    if parts:
        return [photo for folder, part in parts.items() for photo in _part_photos(root, folder, part)]
    inner = [name for name in list_folders(f"{root}/{folders[0]}") if name not in NOT_CLASSES]
    if len(folders) == 1 and inner:
        raise InputError(
            f"Expected {root} to have one folder of images per class but got the one folder {folders[0]}, which holds "
            f"the folders {_some(inner)}: give --root {root}/{folders[0]}"
        )
    return [photo for key in folders for photo in _class_photos(root, key, key, "")]


def part_of(name: str, filler: frozenset[str] = frozenset()) -> str:
    """Return the part that a folder's name says: "train", "val", "test", or "" for none.

    Args:
        filler: words (lower case) that may stand in the name beside those in FILLERS.
    """
    words = _words(name)
    kinds = {PARTS[word] for word in words if word in PARTS}
    others = [word for word in words if word not in PARTS and word not in FILLERS and word not in filler]
    return kinds.pop() if len(kinds) == 1 and not others else ""


def read_parts(root: str, folders: Sequence[str]) -> dict[str, str]:
    """Return folder -> part if a root's folders are the parts of a split; an empty dict if they are classes.

    Raises:
        InputError: some folders are called like parts, but they cannot be the parts of one split and are not clearly
            classes.
    """
    parts = {name: part for name in folders if (part := part_of(name, _shared_words(folders)))}
    if not parts:
        return {}
    nested = [name for name in parts if list_folders(f"{root}/{name}")]
    if not nested:
        if len(set(parts.values())) > 1 or len(parts) == len(folders):
            raise InputError(
                f"Expected the folders {_some(list(parts))} in {root}, which are called like the parts of a split, to "
                "hold one folder of images per class but got none"
            )
        return {}  # a class may be called "train", too
    told = f"the folders {', '.join(f'{name} ({part})' for name, part in parts.items())} of {root} as parts of a split"
    for part in ("train", "val", "test"):
        same = [name for name, its in parts.items() if its == part]
        if len(same) > 1:
            raise InputError(f"Expected one folder for {part} but, taking {told}, got {' and '.join(same)}")
    if "train" not in parts.values():
        raise InputError(f"Expected a folder train beside the others but, taking {told}, got none")
    others = [name for name in folders if name not in parts and list_images_below(f"{root}/{name}")]
    if others and len(parts) == 1:
        raise InputError(
            f"Expected either one folder per class or the parts of a split in {root} but got the folder "
            f"{next(iter(parts))}, which is called like a part and holds folders, beside {_some(others)}"
        )
    if others:
        logger.warning(f"Left out what is beside {', '.join(parts)} in {root}: {_some(others)}")
    return {name: part for name, part in parts.items() if _holds_classes(root, name, part)}


def describe(photos: Sequence[Photo], root: str, chosen: Sequence[tuple[str, dict[str, int]]]) -> str:
    """Tell in a few lines how a folder or CSV of images was understood.

    Args:
        photos: the images as they were found.
        root: the folder or CSV that they come from.
        chosen: (class name, number of images by part) for each class, in the order of labels.
    """
    given = {photo.part for photo in photos} - {""}
    drawn = " and ".join(part for part in ("train", "val", "test") if part not in given)
    how = "train, val and test as given" if not drawn else f"{drawn} drawn once, the rest as given"
    how = how if given else "split drawn once"
    totals = Counter({part: sum(counts.get(part, 0) for _, counts in chosen) for part in ("train", "val", "test")})
    lines = [f"Images in {root}: {len(chosen)} classes, {sum(totals.values())} images ({how})"]
    width = max(len(name) for name, _ in chosen[:UNDERSTOOD_CLASSES])
    rows = [("all classes", totals), *chosen[:UNDERSTOOD_CLASSES]]
    for name, counts in rows:
        numbers = "  ".join(f"{part} {counts.get(part, 0):>5}" for part in ("train", "val", "test"))
        lines.append(f"  {name:<{max(width, 11)}}  {numbers}")
    if len(chosen) > UNDERSTOOD_CLASSES:
        lines.append(f"  ... and {len(chosen) - UNDERSTOOD_CLASSES} more classes")
    return "\n".join(lines)


def _words(name: str) -> list[str]:
    """Split a name at its capitals, digits and signs, in lower case: "TrainSet_2" -> ["train", "set", "2"]."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.findall(r"[^\W\d_]+|\d+", apart.lower())
    return [piece for word in words for piece in _unglued(word)]


def _unglued(word: str) -> list[str]:
    # Split words that people glue together: "trainset", "testdata".
    for part in PARTS:
        if word.startswith(part) and word[len(part) :] in FILLERS:
            return [part, word[len(part) :]]
    return [word]


def _shared_words(folders: Sequence[str]) -> frozenset[str]:
    """Return the other words in names that differ only in the part ("seg" for "seg_train" and "seg_test")."""
    found: Counter[tuple[str, ...]] = Counter()
    for name in folders:
        words = _words(name)
        if any(word in PARTS for word in words):
            found[tuple(word for word in words if word not in PARTS and word not in FILLERS)] += 1
    return frozenset(word for words, count in found.items() if count > 1 for word in words)


def _holds_classes(root: str, name: str, part: str) -> bool:
    if list_folders(f"{root}/{name}"):
        return True
    if part == "train":
        raise InputError(f"Expected {root}/{name} to hold one folder of images per class but it has no folders")
    flat = len(list_images(f"{root}/{name}"))
    if flat:
        logger.warning(f"Left out {root}/{name}: its {flat} images lie in no class folder (predict.py classifies such)")
    return False


def _part_photos(root: str, folder: str, part: str) -> list[Photo]:
    inner = list_folders(f"{root}/{folder}")
    stray = list_images(f"{root}/{folder}")
    if len(inner) == 1 and not stray and (inner[0] == folder or part_of(inner[0]) == part):
        return _part_photos(root, f"{folder}/{inner[0]}", part)  # archives that hold a folder of their own name
    if stray:
        logger.warning(f"Left out {len(stray)} images beside the class folders in {root}/{folder}: {_some(stray)}")
    return [photo for key in inner for photo in _class_photos(root, f"{folder}/{key}", key, part)]


def _class_photos(root: str, folder: str, key: str, part: str) -> list[Photo]:
    others: Counter[str] = Counter()
    photos = [Photo(f"{folder}/{path}", key, part) for path in list_images_below(f"{root}/{folder}", others)]
    kinds = tell_kinds(others)
    if not photos and part in ("", "train"):
        beside = f"files of other kinds: {kinds}" if kinds else "nothing"
        raise InputError(f"Expected the class folder {root}/{folder} to hold images but got {beside}")
    if kinds:
        logger.warning(f"Left out files in {root}/{folder} that are no images of a known kind: {kinds}")
    return photos


def _some(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")

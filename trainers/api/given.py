"""Take labeled images as they are given, check them, and make items of a dataset of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dassl.data.datasets import Datum
from dassl.utils import InputError

from ..clip import clean_classname
from .images import as_files, list_images


def folder_of(X: Any) -> str:
    """Return the path of the folder, or of the CSV file, that stands for labeled images.

    Raises:
        InputError: it is no path.
    """
    if not isinstance(X, str | os.PathLike):
        raise InputError(
            f"Expected labels y for the images, or X to be the path of a folder or of a CSV file, but got no y and "
            f"X of type {type(X).__name__}"
        )
    return os.fspath(X)


def items_of(X: Any, y: Any, class_names: Mapping[Any, str], folder: Path) -> tuple[list[Datum], np.ndarray[Any, Any]]:
    """Return an item for each image, and the classes [C] in the order of the items' labels.

    Args:
        X: images, see `list_images`.
        y: a label for each.
        class_names: label -> name that CLIP reads; a label that is not there is its own name.
        folder: where images that are no files are written.

    Raises:
        InputError: images or labels are wrong.
    """
    sources, labels = list_images(X), np.asarray(y)
    if labels.ndim != 1 or len(labels) != len(sources):
        raise InputError(f"Expected a label for each of {len(sources)} images but got y of shape {labels.shape}")
    if labels.dtype.kind == "f" and not (np.isfinite(labels).all() and (labels == np.rint(labels)).all()):
        raise InputError("Expected y to hold classes (text or whole numbers) but got other numbers")
    try:
        classes, places = np.unique(labels, return_inverse=True)
    except TypeError as error:
        raise InputError(f"Expected all labels in y to be of one kind but got a mixture: {error}") from error
    if len(classes) < 2:
        raise InputError(f"Expected images of two classes or more but got {len(classes)} class")
    names = names_of(classes, class_names)
    items = [
        Datum(path, int(place), classname=names[place])
        for path, place in zip(as_files(sources, folder), places, strict=True)
    ]
    return items, classes


def names_of(classes: np.ndarray[Any, Any], given: Mapping[Any, str]) -> list[str]:
    """Return the name that CLIP reads of each class.

    Raises:
        InputError: a name is given for something else, or two classes would have the same prompt.
    """
    labels = classes.tolist()
    strange = [label for label in given if label not in labels]
    if strange:
        raise InputError(f"Expected class_names to name classes of y ({labels[:10]}) but got {strange[0]!r}")
    names = [str(given.get(label, label)) for label in labels]
    counts = Counter(clean_classname(name).lower().strip() for name in names)
    twice = next((name for name, count in counts.items() if count > 1 or not name), None)
    if twice is not None:
        raise InputError(f"Expected class names that CLIP can tell apart but two are called {twice!r}, or one ''")
    return names


def all_paths(X: Any) -> bool:
    """Return whether all images are given as paths."""
    return isinstance(X, str | os.PathLike) or all(isinstance(image, str | os.PathLike) for image in X)

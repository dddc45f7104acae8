"""Digits and Shapes with made-up class names, for methods that have to do without what CLIP knows of names.

The images, the split and the few-shot picks are those of Digits and Shapes; only the names differ. Zero-shot CLIP is
near chance here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from dassl.data.datasets import DATASET_REGISTRY, Datum

from .cache import build_once, made_dataset_dir
from .digits import Digits
from .shapes import Shapes, drawn_shapes
from .splits import Split

# blazo, blemi, blilu, blono, dazo, ...
NAMES = tuple(
    start + end
    for start in ("bl", "d", "fr", "gw", "k", "pl", "sk", "tr", "v", "z")
    for end in ("azo", "emi", "ilu", "ono")
)


def renamed(split: Split) -> Split:
    """Return a split whose class of label k is called NAMES[k]."""
    return Split(*([Datum(one.impath, one.label, one.domain, NAMES[one.label]) for one in part] for part in split))


@DATASET_REGISTRY.register()
class DigitsNonsense(Digits):
    """`Digits` with made-up class names."""

    folder = "digits_nonsense"

    def make_split(self) -> Split:
        return renamed(super().make_split())


@DATASET_REGISTRY.register()
class ShapesNonsense(Shapes):
    """`Shapes` with made-up class names."""

    folder = "shapes_nonsense"

    def locate(self, root: str) -> Path:
        """Return the folder, whose images are copied from `Shapes`: drawing them takes far longer."""

        def copy(folder: Path) -> None:
            shutil.copytree(drawn_shapes(root) / self.images, folder / self.images)

        return build_once(made_dataset_dir(root, self.folder), copy)

    def make_split(self) -> Split:
        return renamed(super().make_split())

"""Digits and Shapes with made-up class names, for methods that have to do without what CLIP knows of names.

The images, the split and the few-shot picks are those of Digits and Shapes; only the names differ. Zero-shot CLIP is
near chance here.
"""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY, Datum

from .digits import Digits
from .shapes import Shapes
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

    def make_split(self) -> Split:
        return renamed(super().make_split())

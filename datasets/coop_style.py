"""Static methods that readers written for CoOp call on its OxfordPets and DescribableTextures, so that they run here.

A user's own dataset is usually a copy of CoOp's `datasets/eurosat.py`, which takes its parts from these classes. Here
the methods are thin: they call the functions that our own readers use, with their checks, sorted listings and seeded
generators (CoOp draws from Python's global one and shuffles listings in the file system's order). The method that such
readers call on ImageNet is in imagenet.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from dassl.data.datasets import Datum

from .splits import Split, read_split, split_by_folder, split_trainval, subsample_classes, write_split


class SplitTools:
    """The static methods of CoOp's OxfordPets."""

    @staticmethod
    def read_split(filepath: str | Path, path_prefix: str | Path) -> Split:
        """Read (train, val, test) from a split JSON whose paths are relative to `path_prefix`; see `read_split`."""
        return read_split(filepath, path_prefix)

    @staticmethod
    def save_split(
        train: list[Datum], val: list[Datum], test: list[Datum], filepath: str | Path, path_prefix: str | Path
    ) -> None:
        """Write a split JSON with paths relative to `path_prefix`; see `write_split`."""
        write_split(filepath, path_prefix, Split(train, val, test))

    @staticmethod
    def split_trainval(trainval: Sequence[Datum], p_val: float = 0.2) -> tuple[list[Datum], list[Datum]]:
        """Cut an official train+val list into train and val; see `split_trainval`."""
        return split_trainval(trainval, p_val)

    @staticmethod
    def subsample_classes(*args: Sequence[Datum], subsample: str = "all") -> list[list[Datum]]:
        """Keep the base or the new half of the classes in every list; see `subsample_classes`."""
        return subsample_classes(*args, subsample=subsample)


class FolderTools:
    """The static method of CoOp's DescribableTextures."""

    @staticmethod
    def read_and_split_data(
        image_dir: str | Path,
        p_trn: float = 0.5,
        p_val: float = 0.2,
        ignored: Collection[str] = (),
        new_cnames: Mapping[str, str] | None = None,
    ) -> Split:
        """Split a tree with one folder per class into (train, val, test); see `split_by_folder`."""
        return split_by_folder(image_dir, ignored, new_cnames, p_train=p_trn, p_val=p_val)

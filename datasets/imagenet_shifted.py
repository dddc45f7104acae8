"""The base class of the four shifted test sets of ImageNet."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import ClassVar

from yacs.config import CfgNode

from dassl.data.datasets import DatasetBase
from dassl.utils import InputError

from .files import list_folders
from .imagenet import CLASSNAMES, ImageNet, check_known, read_class_folders, read_classnames
from .split_dataset import check_shots, docs_hint, find_dataset
from .splits import Split, split_digest

logger = logging.getLogger(__name__)


class ShiftedImageNet(DatasetBase):
    """A test set over (some of) ImageNet's classes: one folder per class, and ImageNet's `classnames.txt` beside them.

    Labels are positions among the classes that are there, as in CoOp; `class_indices` gives their labels in ImageNet.
    DATASET.NUM_SHOTS and DATASET.SUBSAMPLE_CLASSES change nothing, as in CoOp.

    Attributes:
        images: name of the folder that holds the class folders.
        all_classes: whether every class of `classnames.txt` must be there.
        class_indices: for each class its label in ImageNet: a classifier trained there can be cut to these classes.
        test_only: nothing may be trained here; `train_x` equals `test` and only carries the class names.
    """

    folder: ClassVar[str]
    images: ClassVar[str]
    all_classes: ClassVar[bool] = False
    test_only = True
    check_files = False  # the files have just been listed

    def __init__(self, cfg: CfgNode) -> None:
        check_shots(cfg.DATASET.NUM_SHOTS)
        self.missing_hint = docs_hint(type(self).__name__)
        root = find_dataset(type(self).__name__, self.folder, cfg.DATASET.ROOT)
        self.dataset_dir, self.image_dir = str(root), str(root / self.images)
        names = self._read_classnames(root)
        # Class folder -> label in ImageNet, in the order of those labels.
        indices = {folder: label for label, folder in enumerate(self.class_folders(list(names)))}
        classnames = list(names.values())
        present = sorted(list_folders(self.image_dir), key=lambda folder: indices.get(folder, -1))
        check_known(present, indices, self.image_dir, self.missing_hint)
        self._check_all(present, list(indices))
        self.class_indices = [indices[folder] for folder in present]
        test = read_class_folders(self.image_dir, present, [classnames[label] for label in self.class_indices])
        self.split_digest = self.data_digest = split_digest(Split([], [], test), self.image_dir)
        if cfg.DATASET.SUBSAMPLE_CLASSES != "all":
            logger.warning(
                f"DATASET.SUBSAMPLE_CLASSES has no effect on {type(self).__name__}: all its classes are used"
            )
        super().__init__(train_x=test, test=test)

    def class_folders(self, wnids: list[str]) -> list[str]:
        """Return the names of the folders of ImageNet's classes, given their WordNet ids in label order."""
        return wnids

    def _read_classnames(self, root: Path) -> dict[str, str]:
        name = type(self).__name__
        candidates = [root / CLASSNAMES, root.parent / ImageNet.folder / CLASSNAMES]
        found = [path for path in candidates if path.is_file()]
        absent = [str(candidates[0])] * (not found) + [self.image_dir] * (not os.path.isdir(self.image_dir))
        if absent:
            raise InputError(
                f"Expected {name} to have {CLASSNAMES} (or ImageNet's, {candidates[1]}) and {self.images} but "
                f"{len(absent)} of 2 are missing: {', '.join(absent)}{self.missing_hint}"
            )
        return read_classnames(found[0])

    def _check_all(self, present: list[str], expected: list[str]) -> None:
        if not present:
            raise InputError(f"Expected {self.image_dir} to have one folder per class but it has none")
        absent = [folder for folder in expected if folder not in present] if self.all_classes else []
        if absent:
            raise InputError(
                f"Expected {type(self).__name__} to have a folder for each class of {CLASSNAMES} but {len(absent):,} "
                f"of {len(expected):,} are missing: {', '.join(f'{self.image_dir}/{name}' for name in absent[:5])}"
                f"{self.missing_hint}"
            )

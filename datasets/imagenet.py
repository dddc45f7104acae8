"""ImageNet: 1,000 classes of the 2012 challenge (Russakovsky et al., 2015)."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from yacs.config import CfgNode

from dassl.data.datasets import DATASET_REGISTRY, Datum
from dassl.utils import InputError

from .files import list_folders, list_images, read_table
from .split_dataset import MAX_VAL_SHOTS, SplitDataset, check_val
from .splits import Split

logger = logging.getLogger(__name__)

CLASSNAMES = "classnames.txt"


def read_classnames(path: str | Path) -> dict[str, str]:
    """Read WordNet id -> class name, in the order of the ids.

    The file has a line such as `n01440764 tench` per class. Names may repeat (`missile` and `sunglasses` do): classes
    are told apart by id, never by name.

    Raises:
        InputError: the file is missing or malformed, or gives one id two lines.
    """
    names: dict[str, str] = {}
    for wnid, name in read_table(path, str, str):
        if wnid in names:
            raise InputError(f"Expected {path} to name each id once but got {wnid} as {names[wnid]!r} and {name!r}")
        names[wnid] = name
    return dict(sorted(names.items()))


def read_class_folders(image_dir: str, folders: Sequence[str], names: Sequence[str]) -> list[Datum]:
    """List the images of `folders`, sorted inside each; label = position in `folders`.

    Raises:
        InputError: a folder has no images.
    """
    data = []
    for label, (folder, name) in enumerate(zip(folders, names, strict=True)):
        images = list_images(f"{image_dir}/{folder}")
        if not images:
            raise InputError(f"Expected {image_dir}/{folder} (class {name!r}) to have images but it has none")
        data += [Datum(impath=f"{image_dir}/{folder}/{image}", label=label, classname=name) for image in images]
    return data


@DATASET_REGISTRY.register()
class ImageNet(SplitDataset):
    """`images/train` and `images/val`, one folder per WordNet id in each; test = the official validation set.

    CoOp validates on the test set. Here the validation set is min(shots, 4) images per class from the training images
    that were not picked; without shots there is no validation set. DATASET.VAL "coop" restores CoOp's validation set,
    and then nothing may be selected on it. Files are sorted, while CoOp's picks follow the file system's order: to
    continue from those picks, copy CoOp's `split_fewshot` folder.
    """

    folder = "imagenet"
    split_name = ""  # the folders are the split
    sources = (CLASSNAMES, "images/train", "images/val")
    check_files = False  # the files have just been listed
    read_classnames = staticmethod(read_classnames)  # readers written for CoOp call it on the class

    def make_split(self) -> Split:
        names = read_classnames(f"{self.dataset_dir}/{CLASSNAMES}")
        train_dir, test_dir = f"{self.image_dir}/train", f"{self.image_dir}/val"
        folders, tested = list_folders(train_dir), list_folders(test_dir)
        if not folders:
            raise InputError(f"Expected {train_dir} to have one folder per class but it has none{self.missing_hint}")
        if folders != tested:  # labels are positions in this list, so the two must agree
            apart = sorted(set(folders) ^ set(tested))
            raise InputError(
                f"Expected {train_dir} and {test_dir} to have the same class folders but {len(apart)} of "
                f"{len({*folders, *tested})} are in one only: {', '.join(apart[:5])}{self.missing_hint}"
            )
        check_known(folders, names, train_dir, self.missing_hint)
        if len(folders) < len(names):
            logger.warning(
                f"{self.image_dir} has {len(folders)} of the {len(names)} classes of {CLASSNAMES}: results are not "
                "those of ImageNet"
            )
        classnames = [names[folder] for folder in folders]
        return Split(
            read_class_folders(train_dir, folders, classnames), [], read_class_folders(test_dir, folders, classnames)
        )

    def draw_val(self, split: Split, train: list[Datum], shots: int, rng: random.Random | None) -> list[Datum]:
        """Draw up to min(shots, 4) images per class from the training images that are not in `train`."""
        picked = {item.impath for item in train}
        rest = [item for item in split.train if item.impath not in picked]
        val: list[Datum] = self.generate_fewshot_dataset(rest, num_shots=min(shots, MAX_VAL_SHOTS), rng=rng)
        return val

    def choose_val(self, val: list[Datum], split: Split, cfg: CfgNode) -> list[Datum]:
        if check_val(cfg) == "own":
            return val
        if cfg.TEST.FINAL_MODEL == "best_val":
            raise InputError(
                "Expected TEST.FINAL_MODEL to be last_step with DATASET.VAL coop, where the validation images are the "
                "test images, but got best_val"
            )
        return split.test


def check_known(folders: Iterable[str], names: Iterable[str], where: str, hint: str) -> None:
    """Refuse class folders that `classnames.txt` does not name."""
    unknown = sorted(set(folders).difference(names))
    if unknown:
        raise InputError(
            f"Expected the folders of {where} to be classes of {CLASSNAMES} but {len(unknown)} are not: "
            f"{', '.join(itertools.islice(unknown, 5))}{hint}"
        )

"""The base class of datasets for few-shot benchmarks: a split, few-shot picks from it, base/new halves.

A reader says where its images are and what its classes are called; `SplitDataset` does the rest:

    split JSON (or a splitter, whose result is then saved as one) -> few-shot picks -> base/new -> train_x, val, test

Every random choice comes from a generator of its own, seeded as CoOp seeds Python's global one, so that a published
split gives CoOp's picks image for image, whatever random calls the rest of the program has made. The order in which
the picks are drawn is part of that contract: all training classes first, then all validation classes, each class in
the order of its first appearance, on all classes before base/new is applied.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from yacs.config import CfgNode

from dassl.data.datasets import DatasetBase, Datum
from dassl.utils import InputError

from .cache import cache_root
from .picks import Picks, find_picks, save_picks
from .splits import Split, _check_classes, _digest, read_split, relative_items, subsample_classes, write_split

logger = logging.getLogger(__name__)
MAX_VAL_SHOTS = 4  # validation images per class: min(shots, 4), as in CoOp


class SplitDataset(DatasetBase):
    """A dataset with a split file; a subclass gives a few names and, if it can make its split, `make_split`.

    All images of the split must exist, also those that a few-shot run does not use: whether a dataset is complete does
    not depend on the seed.

    Attributes:
        folder: name of the dataset's folder under DATASET.ROOT.
        images: name of the image folder inside it; "" where the split's paths start at the dataset's folder.
        split_name: file name of the split JSON inside the dataset's folder; "" where official lists are the split and
            are read each time.
        sources: files and folders, relative to the dataset's folder, that `make_split` reads.
        dataset_dir, image_dir: full paths of the dataset's folder and of its image folder.
        split_digest: SHA-256 of the whole split, for the run's records.
        data_digest: digest that binds a run to its images, see `bind_data`.
    """

    folder: ClassVar[str]
    images: ClassVar[str] = "images"
    split_name: ClassVar[str] = "split.json"
    sources: ClassVar[tuple[str, ...]] = ()

    def __init__(self, cfg: CfgNode) -> None:
        shots = check_shots(cfg.DATASET.NUM_SHOTS)
        self.missing_hint = docs_hint(type(self).__name__)
        if cfg.DATALOADER.SKIP_BAD_IMAGES:
            self.check_files = False  # missing images are then named and left out, like unreadable ones
        root = self.locate(cfg.DATASET.ROOT)
        self.dataset_dir = str(root)
        self.image_dir = str(root / self.images) if self.images else str(root)
        split = self._load_split()
        items = [relative_items(part, self.image_dir) for part in split]
        self.split_digest = _digest(items)
        self.data_digest = self.bind_data(split)
        index = zip(itertools.chain(*items[:2]), itertools.chain(*split[:2]), strict=True)
        train, val = self._pick(split, shots, cfg.SEED, {item[0]: datum for item, datum in index})
        if len(train) < len(split.train):
            logger.info(
                f"Using {len(train):,} of {len(split.train):,} training images, at most {shots} per class "
                "(DATASET.NUM_SHOTS; -1 takes all)"
            )
        train, val, test = subsample_classes(
            train, self.choose_val(val, split, cfg), split.test, subsample=cfg.DATASET.SUBSAMPLE_CLASSES
        )
        self.check_files = False  # done, for the whole split
        super().__init__(train_x=train, val=val or None, test=test)

    def locate(self, root: str) -> Path:
        """Return the dataset's folder for a DATASET.ROOT ("" = not given).

        Datasets that make their own images override this method.

        Raises:
            InputError: no root given, or the dataset is not there.
        """
        return find_dataset(type(self).__name__, self.folder, root)

    def bind_data(self, split: Split) -> str:
        """Return the digest that binds a run to its images: `split_digest`, which suffices for a public dataset."""
        return self.split_digest

    def make_split(self) -> Split:
        """Make the split when there is no split file; the result is saved as one."""
        raise InputError(
            f"Expected {self.dataset_dir}/{self.split_name} to exist but there is no such file{self.missing_hint}"
        )

    def draw_val(self, split: Split, train: list[Datum], shots: int, rng: random.Random | None) -> list[Datum]:
        """Draw the few-shot validation images that go with the picked `train`, which `rng` has drawn before."""
        val: list[Datum] = self.generate_fewshot_dataset(split.val, num_shots=min(shots, MAX_VAL_SHOTS), rng=rng)
        return val

    def choose_val(self, val: list[Datum], split: Split, cfg: CfgNode) -> list[Datum]:
        """Return the validation images that DATASET.VAL asks for.

        Only a dataset without validation images of its own has a choice; here it is `val` in any case.

        Raises:
            InputError: DATASET.VAL is neither own nor coop.
        """
        check_val(cfg)
        return val

    def _load_split(self) -> Split:
        # A read-only dataset folder keeps its split in the user's cache, under a name made of the folder's path.
        home = Path(self.dataset_dir) / self.split_name
        away = _cached_folder(self.dataset_dir) / self.split_name
        for path in (home, away):
            if self.split_name and path.exists():
                split = read_split(path, self.image_dir)
                if self.check_files:
                    self._check_files(itertools.chain(*split))
                return split
        self._check_sources()
        split = self.make_split()
        _check_classes(f"the split made from {self.dataset_dir}", split)
        if self.check_files:  # before the split is saved
            self._check_files(itertools.chain(*split))
        if not self.split_name:
            return split
        try:
            write_split(home, self.image_dir, split)
            logger.info(f"Saved split to {home}")
        except OSError:
            _write_or_warn(away, lambda: write_split(away, self.image_dir, split))
        return split

    def _check_sources(self) -> None:
        absent = [f"{self.dataset_dir}/{name}" for name in self.sources]
        absent = [path for path in absent if not os.path.exists(path)]
        if absent:
            what = f"{self.split_name} or what its split is made from" if self.split_name else "its lists and images"
            raise InputError(
                f"Expected {type(self).__name__} to have {what} but {len(absent)} of {len(self.sources)} are missing: "
                f"{', '.join(absent)}{self.missing_hint}"
            )

    def _pick(self, split: Split, shots: int, seed: int, index: Mapping[str, Datum]) -> tuple[list[Datum], list[Datum]]:
        """Pick few-shot train and val: from a saved file if one fits this split, else drawn (and saved if seeded)."""
        if shots < 1:
            return split.train, split.val
        _check_enough(type(self).__name__, split.train, shots)
        wanted = Picks(type(self).__name__, shots, seed, self.split_digest)
        folders = [Path(self.dataset_dir) / "split_fewshot", _cached_folder(self.dataset_dir) / "split_fewshot"]
        found = None
        if seed >= 0:
            found = next(filter(None, (find_picks(folder, wanted, index) for folder in folders)), None)
            if found is not None and found.val is not None:
                return found.train, found.val
        # Seeded like CoOp's global generator, but nobody else draws from it. Without a seed: Python's global one.
        rng = random.Random(seed) if seed >= 0 else None
        train = self.generate_fewshot_dataset(split.train, num_shots=shots, rng=rng)
        if found is not None:  # an old pickle with train only: val is drawn as after a fresh train
            train = found.train
        val = self.draw_val(split, train, shots, rng)
        if seed >= 0:
            content = {"train": relative_items(train, self.image_dir), "val": relative_items(val, self.image_dir)}
            try:
                save_picks(folders[0], wanted, content)
            except OSError:
                _write_or_warn(folders[1], lambda: save_picks(folders[1], wanted, content))
        return train, val


def docs_hint(dataset: str) -> str:
    """Return the end of a message about something missing: where to read on."""
    return f" (see docs/DATASETS.md, section {dataset})"


def find_dataset(name: str, folder: str, root: str) -> Path:
    """Return `root/folder` after checking that both exist.

    Raises:
        InputError: one of them is missing; the message names the dataset, what is missing and where to read on.
    """
    if not root:
        raise InputError(
            f"Expected --root (or DATASET.ROOT) to be the folder that holds {folder} for {name} but none was given"
            f"{docs_hint(name)}"
        )
    parent = Path(root).expanduser().absolute()
    for path in (parent, parent / folder):
        if not os.path.isdir(path):
            what = "is no folder" if os.path.lexists(path) else "does not exist"
            raise InputError(f"Expected {name} to be in {parent / folder} but {path} {what}{docs_hint(name)}")
    return parent / folder


def check_val(cfg: CfgNode) -> str:
    """Check DATASET.VAL and return it: "own" or "coop"."""
    value: Any = cfg.DATASET.get("VAL", "own")
    if value not in ("own", "coop"):
        raise InputError(f"Expected DATASET.VAL to be own or coop but got {value!r}")
    return str(value)


def check_shots(shots: Any) -> int:
    """Check DATASET.NUM_SHOTS and return it: -1 (all images) or at least 1."""
    if not isinstance(shots, int) or isinstance(shots, bool) or (shots < 1 and shots != -1):
        raise InputError(f"Expected DATASET.NUM_SHOTS to be -1 (all images) or at least 1 but got {shots!r}")
    return shots


def _check_enough(dataset: str, train: Sequence[Datum], shots: int) -> None:
    # If a class has fewer images than shots, CoOp takes them all and says nothing. For parity we do the same, but
    # warn. More shots than ANY class has images can only be a mistake.
    counts = Counter(item.label for item in train)
    if max(counts.values()) < shots:
        raise InputError(
            f"Expected DATASET.NUM_SHOTS to be at most {max(counts.values())}, the training images of {dataset}'s "
            f"largest class, but got {shots}"
        )
    names = {item.label: item.classname for item in train}
    short = [f"{names[label]} ({count})" for label, count in counts.items() if count < shots]
    if short:
        more = ", ..." if len(short) > 5 else ""
        logger.warning(f"{len(short)} classes have fewer than {shots} training images: {', '.join(short[:5])}{more}")


def _cached_folder(dataset_dir: str) -> Path:
    path = os.path.realpath(dataset_dir)
    return cache_root() / "splits" / f"{Path(path).name}-{hashlib.sha256(path.encode()).hexdigest()[:12]}"


def _write_or_warn(where: Path, write: Callable[[], None]) -> None:
    # Saving a split or picks is a convenience: both would be drawn alike again, so a run does not fail without it.
    try:
        write()
    except OSError as error:
        logger.warning(f"Could not save to {where}: {error.strerror or error}")

"""What the datasets share: split files, the two splitters, few-shot picks, base/new halves.

A reader says where its images are and what its classes are called, and gets from `SplitDataset` the rest:

    split JSON (or a splitter, whose result is then saved as one) -> few-shot picks -> base/new -> train_x, val, test

Every random choice comes from a generator of its own, seeded as CoOp seeds Python's global one, so that a published
split gives CoOp's picks image for image, whatever random calls the rest of the program has made. The order in which
the picks are drawn is part of that contract: all training classes first, then all validation classes, each class in
the order of its first appearance, on all classes before base/new is applied.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from yacs.config import CfgNode

from dassl.data.datasets import DatasetBase, Datum
from dassl.utils import InputError, atomic_write

from .cache import cache_root
from .files import check_name, list_folders, list_images
from .picks import Picks, find_picks, save_picks

logger = logging.getLogger(__name__)

SPLIT_SEED = 0  # of the splitters: a split belongs to the dataset, not to a run, so it does not follow cfg.SEED
MAX_VAL_SHOTS = 4  # validation images per class: min(shots, 4), as in CoOp


class Split(NamedTuple):
    """The three lists of a dataset, in file order."""

    train: list[Datum]
    val: list[Datum]
    test: list[Datum]


# ---------------------------------------------------------------------------------------------------- split files


def read_split(path: str | Path, image_dir: str | Path) -> Split:
    """Read a split JSON: `{"train": [[relative path, label, class name], ...], "val": ..., "test": ...}`.

    Paths are relative to `image_dir` and written with `/`. Order and class names are kept as they are in the file.

    Raises:
        InputError: unreadable file, malformed entry, an absolute path or one that leaves `image_dir`, an image listed
            twice, labels with a gap, one label with two names, an empty `train` or `test`. The message names the file
            and the entry. Two labels with one name are fine: classes are told apart by label.
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
    """Write a split JSON (the form that `read_split` reads and CoOp wrote), at once or not at all."""
    content = {part: relative_items(getattr(split, part), image_dir) for part in Split._fields}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(str(path)) as file:
        json.dump(content, file, indent=4, separators=(",", ": "))


def relative_items(data: Iterable[Datum], image_dir: str | Path) -> list[list[Any]]:
    """Data as `[path relative to image_dir, label, class name]`, the form that files keep.

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
    """SHA-256 (hex) of a split's relative paths, labels and names in order: the same wherever the images lie."""
    return _digest([relative_items(part, image_dir) for part in split])


def _digest(content: list[list[list[Any]]]) -> str:
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ------------------------------------------------------------------------------------------------------ splitters


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
        InputError: no such folder, no class folder, or a class with too few images for three non-empty parts.
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
    """Cut an official train+val list: per class, in order of first appearance, shuffle; the first `p_val` are val.

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


# ------------------------------------------------------------------------------------------------------- base/new


def subsample_classes(*lists: Sequence[Datum], subsample: str) -> list[list[Datum]]:
    """Keep the base or the new half of the classes in every list and number them from 0.

    The classes are the labels of the first list: base = the first ceil(n / 2) of them in label order, new = the rest.
    `subsample="all"` keeps everything. Works by label, so classes that share a name stay apart.

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


# --------------------------------------------------------------------------------------------------------- reader


class SplitDataset(DatasetBase):
    """A dataset with a split file. A subclass gives a few names and, where it can make its split, `make_split`.

    All images of the split must exist, also those that a few-shot run does not use: whether a dataset is complete does
    not depend on the seed.

    Attributes:
        folder: name of the dataset's folder under DATASET.ROOT.
        images: name of the image folder inside it; "" where the split's paths start at the dataset's folder.
        split_name: file name of the split JSON inside the dataset's folder; "" where official lists are the split and
            are read each time.
        sources: files and folders, relative to the dataset's folder, that `make_split` reads.
        dataset_dir, image_dir: those folders' full paths.
        split_digest: SHA-256 of the whole split, for the run's records.
        data_digest: what a run is bound to, see `bind_data`.
    """

    folder: ClassVar[str]
    images: ClassVar[str] = "images"
    split_name: ClassVar[str] = "split.json"
    sources: ClassVar[tuple[str, ...]] = ()

    def __init__(self, cfg: CfgNode) -> None:
        shots = check_shots(cfg.DATASET.NUM_SHOTS)
        self.missing_hint = docs_hint(type(self).__name__)
        if cfg.DATALOADER.SKIP_BAD_IMAGES:
            self.check_files = False  # what is missing is then named and left out with what cannot be read
        root = self.locate(cfg.DATASET.ROOT)
        self.dataset_dir = str(root)
        self.image_dir = str(root / self.images) if self.images else str(root)
        split = self._load_split()
        items = [relative_items(part, self.image_dir) for part in split]
        self.split_digest = _digest(items)
        self.data_digest = self.bind_data(split)
        index = zip(itertools.chain(*items[:2]), itertools.chain(*split[:2]), strict=True)
        train, val = self._pick(split, shots, cfg.SEED, {item[0]: datum for item, datum in index})
        train, val, test = subsample_classes(
            train, self.choose_val(val, split, cfg), split.test, subsample=cfg.DATASET.SUBSAMPLE_CLASSES
        )
        self.check_files = False  # done, for the whole split
        super().__init__(train_x=train, val=val or None, test=test)

    def locate(self, root: str) -> Path:
        """The dataset's folder for a DATASET.ROOT ("" = not given). Datasets that make their own images override it.

        Raises:
            InputError: no root given, or the dataset is not there.
        """
        return find_dataset(type(self).__name__, self.folder, root)

    def bind_data(self, split: Split) -> str:
        """Return the digest that binds a run to its images; `split_digest` where the dataset is known to everybody."""
        return self.split_digest

    def make_split(self) -> Split:
        """Make the split when there is no split file; the result is saved as one."""
        raise InputError(
            f"Expected {self.dataset_dir}/{self.split_name} to exist but there is no such file{self.missing_hint}"
        )

    def draw_val(self, split: Split, train: list[Datum], shots: int, rng: random.Random | None) -> list[Datum]:
        """The few-shot validation images that go with the picked `train`; `rng` has drawn those before."""
        val: list[Datum] = self.generate_fewshot_dataset(split.val, num_shots=min(shots, MAX_VAL_SHOTS), rng=rng)
        return val

    def choose_val(self, val: list[Datum], split: Split, cfg: CfgNode) -> list[Datum]:
        """What `val` is for DATASET.VAL; only a dataset without validation images of its own has a choice.

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
        if self.check_files:  # before it is saved
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
        """Few-shot train and val: from a saved file where it fits this split, else drawn (and saved if seeded)."""
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
        if found is not None:  # an old pickle with train only: its val follows, drawn as after a fresh train
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
    """The end of a message about something that is not there."""
    return f" (see docs/DATASETS.md, section {dataset})"


def find_dataset(name: str, folder: str, root: str) -> Path:
    """`root/folder`, both checked. The InputError names the dataset, what is missing and where to read on."""
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
    """DATASET.VAL, checked: "own" or "coop"."""
    value: Any = cfg.DATASET.get("VAL", "own")
    if value not in ("own", "coop"):
        raise InputError(f"Expected DATASET.VAL to be own or coop but got {value!r}")
    return str(value)


def check_shots(shots: Any) -> int:
    """DATASET.NUM_SHOTS, checked: -1 (all images) or at least 1."""
    if not isinstance(shots, int) or isinstance(shots, bool) or (shots < 1 and shots != -1):
        raise InputError(f"Expected DATASET.NUM_SHOTS to be -1 (all images) or at least 1 but got {shots!r}")
    return shots


def _check_enough(dataset: str, train: Sequence[Datum], shots: int) -> None:
    # CoOp takes what a small class has and says nothing. That stays so (parity), with a word; but more shots than ANY
    # class has can only be a mistake.
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
    # Saving a split or picks is a convenience: both are drawn again alike, so a run never fails for want of it.
    try:
        write()
    except OSError as error:
        logger.warning(f"Could not save to {where}: {error.strerror or error}")

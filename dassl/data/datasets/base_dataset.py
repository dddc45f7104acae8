"""The items, and lists of items, that a dataset hands to the loaders."""

from __future__ import annotations

import logging
import operator
import os
import random
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dassl.upstream_names import upstream_name
from dassl.utils import InputError, download_url
from dassl.utils.logger import DETAIL

logger = logging.getLogger(__name__)

__all__ = ["DatasetBase", "Datum"]


class Datum:
    """One item, read-only: where the image is, its label, domain and class name.

    Only the types are checked here. That the files exist is checked by DatasetBase for all items at once, which takes
    one listing per folder instead of one file-system call per image.

    Args:
        impath: path of the image.
        label: class label, 0-based.
        domain: domain label, 0-based.
        classname: name of the class.
    """

    def __init__(
        self, impath: str | os.PathLike[str] = "", label: int = 0, domain: int = 0, classname: str = ""
    ) -> None:
        if not isinstance(impath, (str, os.PathLike)):
            raise InputError(f"Expected impath to be a path but got {impath!r} of type {type(impath).__name__}")
        if not isinstance(classname, str):
            raise InputError(f"Expected classname to be a string but got {classname!r} for {impath}")
        # Pickles that upstream's readers left behind use the same attribute names.
        self._impath = os.fspath(impath)
        self._label = _as_int(label, "label", self._impath)
        self._domain = _as_int(domain, "domain", self._impath)
        self._classname = classname

    @property
    def impath(self) -> str:
        """Path of the image."""
        return self._impath

    @property
    def label(self) -> int:
        """Class label."""
        return self._label

    @property
    def domain(self) -> int:
        """Domain label."""
        return self._domain

    @property
    def classname(self) -> str:
        """Name of the class."""
        return self._classname

    def _key(self) -> tuple[str, int, int, str]:
        return self._impath, self._label, self._domain, self._classname

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Datum) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return (
            f"Datum(impath={self._impath!r}, label={self._label}, domain={self._domain}, classname={self._classname!r})"
        )


def _as_int(value: Any, name: str, impath: str) -> int:
    try:
        return operator.index(value)  # int and NumPy's integers; not float, not str
    except TypeError:
        raise InputError(
            f"Expected {name} to be an integer but got {value!r} of type {type(value).__name__} for {impath}"
        ) from None


def find_missing(paths: Iterable[str]) -> list[str]:
    """Return those of ``paths`` that are no files, in order.

    Each folder is listed once; no file is looked up by itself.

    Raises:
        InputError: a folder is there but cannot be listed.
    """
    listings: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = _file_names(folder or ".")
        if name not in listings[folder]:
            missing.append(path)
    return missing


def _file_names(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if _is_file(entry)}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:  # no permission, a loop of links
        raise InputError(f"Expected {folder} to be a readable folder but got: {error.strerror or error}") from error


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()  # known from the listing; only links need a system call of their own
    except OSError:  # a link to itself
        return False


class DatasetBase:
    """A dataset: four lists of items, and the class names and numbers that follow from them.

    Classes are those of ``train_x``: labels 0..C-1, each with one name. ``val`` and ``test`` may lack some of them but
    may not have others.

    Args:
        train_x: labeled training items.
        train_u: unlabeled training items.
        val: validation items.
        test: test items.

    Raises:
        InputError: files are missing (one error for all of them), labels have a gap, one label has two names, or val or
            test hold a label that train_x lacks.
    """

    dataset_dir: str = ""  # the dataset's folder under DATASET.ROOT
    shown_name: str = ""  # what people call it, where that is not its registered name
    domains: Sequence[str] = ()  # names of all domains
    check_files: bool = True  # False where items are not files
    missing_hint: str = ""  # end of the message about missing files: where to get them
    split_digest: str = ""  # SHA-256 of the whole split (paths, labels, names); "": not known
    data_digest: str = ""  # binds a run to its images: other images have another digest; "": not known
    class_indices: list[int] | None = None  # shifted test sets: each class's label where a classifier was trained
    test_only: bool = False  # True: nothing may be trained here, and train_x only carries the class names

    def __init__(
        self,
        train_x: list[Datum] | None = None,
        train_u: list[Datum] | None = None,
        val: list[Datum] | None = None,
        test: list[Datum] | None = None,
    ) -> None:
        if not train_x:
            raise InputError(f"Expected {type(self).__name__} to have training items but got none")
        self._train_x = train_x
        self._train_u = train_u
        self._val = val
        self._test = test
        if self.check_files:
            self._check_files(item for items in (train_x, train_u, val, test) for item in items or ())
        self._num_classes = self.get_num_classes(train_x)
        self._lab2cname, self._classnames = self.get_lab2cname(train_x)
        self._check_labels()

    @property
    def train_x(self) -> list[Datum]:
        """Labeled training items."""
        return self._train_x

    @property
    def train_u(self) -> list[Datum] | None:
        """Unlabeled training items."""
        return self._train_u

    @property
    def val(self) -> list[Datum] | None:
        """Validation items."""
        return self._val

    @property
    def test(self) -> list[Datum] | None:
        """Test items."""
        return self._test

    def drop(self, paths: Container[str]) -> None:
        """Take the items with these paths out of all lists.

        Raises:
            InputError: a class would be left without training items, or there would be none to test on.
        """

        def rest(items: list[Datum] | None) -> list[Datum] | None:
            return items and [item for item in items if item.impath not in paths]

        train_x, test = rest(self._train_x) or [], rest(self._test)
        kept = {item.label for item in train_x}
        bare = [name for label, name in self._lab2cname.items() if label not in kept]
        if bare:
            raise InputError(
                f"Expected every class of {type(self).__name__} to have training images that can be read but "
                f"{', '.join(bare[:5])}{', ...' if len(bare) > 5 else ''} would have none"
            )
        if self._test and not test:
            raise InputError(f"Expected {type(self).__name__} to have test images that can be read but got none")
        self._train_x, self._test = train_x, test
        self._train_u, self._val = rest(self._train_u) or None, rest(self._val) or None

    def replace_training(self, items: list[Datum]) -> None:
        """Put other items in the place of the labeled training items; the classes stay.

        Raises:
            InputError: a class would be left without training items.
        """
        names = self._lab2cname
        bare = sorted(names.keys() - {item.label for item in items})
        if bare:
            raise InputError(f"Expected every class to keep a training image but {names[bare[0]]} would have none")
        self._train_x = items

    @property
    def lab2cname(self) -> dict[int, str]:
        """Label to class name."""
        return self._lab2cname

    @property
    def classnames(self) -> list[str]:
        """Class names in the order of their labels."""
        return self._classnames

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return self._num_classes

    @staticmethod
    def get_num_classes(data_source: Iterable[Datum]) -> int:
        """Return the number of classes: the highest label + 1."""
        return max(item.label for item in data_source) + 1

    @staticmethod
    def get_lab2cname(data_source: Iterable[Datum]) -> tuple[dict[int, str], list[str]]:
        """Return (name by label, names in label order); a label with two names is an InputError."""
        mapping: dict[int, str] = {}
        for item in data_source:
            name = mapping.setdefault(item.label, item.classname)
            if name != item.classname:
                raise InputError(
                    f'Expected label {item.label} to have one name but got "{name}" and "{item.classname}"'
                )
        mapping = dict(sorted(mapping.items()))
        return mapping, list(mapping.values())

    def check_input_domains(self, source_domains: Sequence[str], target_domains: Sequence[str]) -> None:
        """Raise an InputError unless all given domains are among ``self.domains``."""
        for name, given in (("source", source_domains), ("target", target_domains)):
            for domain in given:
                if domain not in self.domains:
                    raise InputError(
                        f'Expected each {name} domain to be one of {list(self.domains)} but got "{domain}"'
                    )

    def download_data(self, url: str, dst: str, from_gdrive: bool = True) -> None:
        """Download an archive (zip, tar, tar.gz) to ``dst`` unless it is there, and unpack it into the same folder."""
        if not os.path.isfile(dst):
            download_url(url, dst, from_gdrive=from_gdrive)
        folder = Path(dst).parent
        logger.info("Extracting %s", dst)
        try:
            if zipfile.is_zipfile(dst):
                with zipfile.ZipFile(dst) as archive:
                    archive.extractall(folder)
            elif tarfile.is_tarfile(dst):
                if not hasattr(tarfile, "data_filter"):  # Python 3.10 before 3.10.12
                    raise InputError(
                        f'Expected a Python that unpacks safely but got an old one: unpack "{dst}" by hand'
                    )
                with tarfile.open(dst) as tar:
                    tar.extractall(folder, filter="data")  # nothing outside the folder, no devices
            else:
                raise InputError(f'Expected "{dst}" to be a zip or tar archive but it is neither')
        except (zipfile.BadZipFile, tarfile.TarError) as error:
            raise InputError(f'Expected "{dst}" to be a sound archive but got: {error}') from error

    def generate_fewshot_dataset(
        self,
        *data_sources: list[Datum],
        num_shots: int = -1,
        repeat: bool = False,
        rng: random.Random | ModuleType | None = None,
    ) -> Any:
        """Sample ``num_shots`` items per class from each list.

        Classes are visited in the order in which they first appear in the list, with one draw for each class that has
        enough items and none for the others; this order is what makes the picks those of the published protocol.

        Args:
            data_sources: one or more lists of items.
            num_shots: items per class; below 1 the lists are returned as they are.
            repeat: draw with replacement from a class with too few items; False: keep all its items.
            rng: source of randomness; None: Python's global ``random``, as in upstream.

        Returns:
            A list if one list was given, else a list of lists (or the tuple of lists given, when num_shots < 1).
        """
        if num_shots < 1:
            return data_sources[0] if len(data_sources) == 1 else data_sources
        draw: Any = random if rng is None else rng
        logger.info("Picking at most %d images of each class", num_shots, extra=DETAIL)
        output = []
        for data_source in data_sources:
            picked: list[Datum] = []
            for items in self.split_dataset_by_label(data_source).values():
                if len(items) >= num_shots:
                    picked.extend(draw.sample(items, num_shots))
                elif repeat:
                    picked.extend(draw.choices(items, k=num_shots))
                else:
                    picked.extend(items)
            output.append(picked)
        return output[0] if len(output) == 1 else output

    def split_dataset_by_label(self, data_source: Iterable[Datum]) -> dict[int, list[Datum]]:
        """Group items by label; labels come in order of first appearance."""
        output: defaultdict[int, list[Datum]] = defaultdict(list)
        for item in data_source:
            output[item.label].append(item)
        return output

    def split_dataset_by_domain(self, data_source: Iterable[Datum]) -> dict[int, list[Datum]]:
        """Group items by domain; domains come in order of first appearance."""
        output: defaultdict[int, list[Datum]] = defaultdict(list)
        for item in data_source:
            output[item.domain].append(item)
        return output

    def _check_files(self, items: Iterable[Datum]) -> None:
        """Raise one InputError for all items whose files are missing."""
        paths = dict.fromkeys(item.impath for item in items)
        missing = find_missing(paths)
        if missing:
            more = ", ..." if len(missing) > 5 else ""
            raise InputError(
                f"Expected all files of the dataset {type(self).__name__} to exist but {len(missing):,} of "
                f"{len(paths):,} are missing: {', '.join(missing[:5])}{more}{self.missing_hint}"
            )

    def _check_labels(self) -> None:
        name = type(self).__name__
        absent = [label for label in range(self._num_classes) if label not in self._lab2cname]
        if absent or len(self._lab2cname) != self._num_classes:  # the latter: a negative label
            raise InputError(
                f"Expected the training labels of {name} to be 0..{self._num_classes - 1} without a gap "
                f"but got {sorted(self._lab2cname)[:10]}... (absent: {absent[:10]})"
            )
        for split, items in (("val", self._val), ("test", self._test)):
            extra = sorted({item.label for item in items or ()} - self._lab2cname.keys() - {-1})  # -1: unlabeled
            if extra:
                raise InputError(
                    f"Expected the {split} labels of {name} to be among its {self._num_classes} training labels "
                    f"but got {extra[:10]}"
                )


def __getattr__(name: str) -> Any:  # names that upstream's module offers, too
    return upstream_name(__name__, name)

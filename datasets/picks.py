"""Keep few-shot picks on disk: write and read our JSON files, and read CoOp's old pickles without running them.

A pick file is a record and a way to keep picks across versions, not a source of truth. It is used only if it was drawn
from the very split at hand (same digest); else a warning says so and the picks are drawn again.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dassl.data.datasets import Datum
from dassl.utils import InputError, atomic_write
from dassl.utils.logger import DETAIL

logger = logging.getLogger(__name__)

COOP_DATUM = ("dassl.data.datasets.base_dataset", "Datum")  # the one class that CoOp's pickles hold
MAX_PICKLE_BYTES = 64 * 2**20  # CoOp's largest (ImageNet, 16 shots) has about 2 MiB


class Picks(NamedTuple):
    """The dataset, shots, seed and split that a pick file must have been drawn for."""

    dataset: str
    shots: int
    seed: int
    split: str  # digest of the whole split

    @property
    def stem(self) -> str:
        return f"shot_{self.shots}-seed_{self.seed}"  # CoOp's file name


class Found(NamedTuple):
    """Picks read from a file; `val` is None where the file has no val picks (CoOp's pickles of ImageNet)."""

    train: list[Datum]
    val: list[Datum] | None


def find_picks(folder: Path, wanted: Picks, index: Mapping[str, Datum]) -> Found | None:
    """Find the train and val picks saved in `folder`; None if no saved picks fit.

    Args:
        index: relative path -> item, for all items that may be picked.

    Raises:
        InputError: a CoOp pickle is there but is damaged or holds anything but Datum objects.
    """
    path = folder / f"{wanted.stem}.json"
    if path.is_file():
        reason, found = _from_json(path, wanted, index)
    else:
        path = folder / f"{wanted.stem}.pkl"
        if not path.is_file():
            return None
        reason, found = _from_pickle(path, index)
    if found is None:
        logger.warning(f"{path} does not fit this dataset ({reason}): drawing the few-shot images again")
    else:
        logger.info(f"Loading few-shot images from {path}", extra=DETAIL)
    return found


def save_picks(folder: Path, wanted: Picks, content: Mapping[str, list[list[Any]]]) -> None:
    """Write `content` (`train` and `val`: lists of [relative path, label, class name]); OSError if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(str(folder / f"{wanted.stem}.json")) as file:
        json.dump({**wanted._asdict(), **content}, file, indent=1)


def _from_json(path: Path, wanted: Picks, index: Mapping[str, Datum]) -> tuple[str, Found | None]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"unreadable: {error}", None
    if not isinstance(content, dict):
        return "not a JSON object", None
    for key, value in wanted._asdict().items():
        if content.get(key) != value:
            return f"{key} differs", None
    parts = []
    for part in ("train", "val"):
        data = []
        items = content.get(part)
        for item in items if isinstance(items, list) else [items]:
            relative = item[0] if isinstance(item, list) and item else None
            datum = index.get(relative) if isinstance(relative, str) else None
            if datum is None or item != [relative, datum.label, datum.classname]:
                return f"{part} holds {item!r}, which the split does not", None
            data.append(datum)
        parts.append(data)
    return _checked(Found(*parts), index)


def _from_pickle(path: Path, index: Mapping[str, Datum]) -> tuple[str, Found | None]:
    content = read_coop_pickle(path)
    parts: dict[str, list[Datum]] = {}
    for part in content:
        data = []
        for impath, label, name in content[part]:
            datum = _by_suffix(impath, index)
            if datum is None or (datum.label, datum.classname) != (label, name):
                return f"{part} holds {impath}, which the split does not", None
            data.append(datum)
        parts[part] = data
    return _checked(Found(parts.get("train", []), parts.get("val")), index)


def _checked(found: Found, index: Mapping[str, Datum]) -> tuple[str, Found | None]:
    absent = {datum.label for datum in index.values()} - {datum.label for datum in found.train}
    if absent:
        return f"train has no image of label {min(absent)}", None
    chosen = [datum.impath for datum in (*found.train, *(found.val or ()))]
    if len(set(chosen)) < len(chosen):
        return "it holds an image twice", None
    return "", found


def _by_suffix(impath: str, index: Mapping[str, Datum]) -> Datum | None:
    # The pickles hold absolute paths, often of another machine. The image is the one whose relative path is the longest
    # tail of such a path that the split knows.
    names = impath.replace("\\", "/").split("/")
    for start in range(len(names)):
        datum = index.get("/".join(names[start:]))
        if datum is not None:
            return datum
    return None


def read_coop_pickle(path: Path) -> dict[str, list[tuple[str, int, str]]]:
    """Read the lists of (absolute path, label, class name) in a CoOp few-shot pickle.

    Dicts, lists, plain values and one class are admitted. The class is replaced by an empty one: nothing in the file is
    run.

    Raises:
        InputError: the file is damaged, too large, or refers to anything else.
    """

    class Holder:  # made per call: a hostile file could at most set attributes on it
        pass

    def admit(module: str, name: str) -> type:
        if (module, name) == COOP_DATUM:
            return Holder
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    try:
        if path.stat().st_size > MAX_PICKLE_BYTES:
            raise pickle.UnpicklingError(f"more than {MAX_PICKLE_BYTES} bytes")
        content = _Unpickler(path.read_bytes(), admit).load()
        return {
            str(part): [_fields(item, Holder) for item in items]
            for part, items in content.items()
            if part in ("train", "val")
        }
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise InputError(
            f"Expected {path} to be a few-shot pickle of CoOp (lists of Datum, nothing else) but got: {error}. "
            "Delete it to draw the images anew"
        ) from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, admit: Callable[[str, str], type]) -> None:
        super().__init__(io.BytesIO(content))
        self.admit = admit

    def find_class(self, module: str, name: str) -> type:
        return self.admit(module, name)


def _fields(item: Any, holder: type) -> tuple[str, int, str]:
    if type(item) is not holder:
        raise pickle.UnpicklingError(f"a {type(item).__name__} where a Datum should be")
    impath, label, name = (vars(item).get(key) for key in ("_impath", "_label", "_classname"))
    if not (isinstance(impath, str) and isinstance(label, int) and isinstance(name, str)):
        raise pickle.UnpicklingError("a Datum without path, label and class name")
    return impath, label, name

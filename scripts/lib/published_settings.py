"""Read the settings that published numbers rest on where they differ from the method's configuration.

They lie in published/settings.csv; docs/REPRODUCE.md says what the columns are.
"""

from __future__ import annotations

import csv
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dassl.utils import InputError
from trainers.configs import PUBLISHED

SETTINGS = "settings.csv"
PROTOCOLS = ("few-shot", "base2new")


class Settings(NamedTuple):
    """Hold settings of the runs behind published numbers.

    Attributes:
        method: a registered trainer, whose settings hold for its variants, too; or TRAINER@VARIANT.
        protocol: one of PROTOCOLS.
        shots: labeled images of each class; None: any number.
        dataset: stem of a file in configs/datasets; "": any.
        pairs: KEY VALUE pairs.
        source: who says so.
    """

    method: str
    protocol: str
    shots: int | None
    dataset: str
    pairs: tuple[str, ...]
    source: str

    def holds_for(self, method: str, protocol: str) -> bool:
        """Return whether these are settings of TRAINER or TRAINER@VARIANT in a protocol."""
        return self.protocol == protocol and self.method in (method, method.partition("@")[0])


def read_settings(folder: Path | None = None) -> list[Settings]:
    """Return the settings in the file of a folder; None: of published/. Without such a file there are none.

    Raises:
        InputError: the file lacks a column, or a row has a value that cannot be right.
    """
    path = (folder or PUBLISHED) / SETTINGS
    if not path.is_file():
        return []
    found = []
    for where, row in read_rows(path, ("method", "protocol", "shots", "dataset", "settings", "source")):
        try:
            pairs = tuple(shlex.split(row["settings"]))
            shots = int(row["shots"]) if row["shots"] else None
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"Expected shots and settings in {where}: {error}") from error
        if len(pairs) % 2 or not pairs or row["protocol"] not in PROTOCOLS:
            raise InputError(
                f"Expected KEY VALUE pairs and a protocol of {', '.join(PROTOCOLS)} in {where}, but got "
                f"{row['settings']!r} and {row['protocol']!r}"
            )
        found.append(Settings(row["method"], row["protocol"], shots, row["dataset"], pairs, row["source"]))
    return found


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a CSV file by column, each with its place for messages, "FILE, line 2".

    Raises:
        InputError: the file cannot be read, or has other columns.
    """
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            if list(reader.fieldnames or ()) != list(columns):
                got = ", ".join(reader.fieldnames or ()) or "none"
                raise InputError(f"Expected {path} to have the columns {', '.join(columns)} but got {got}")
            for row in reader:
                yield f"{path}, line {reader.line_num}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"Expected {path} to be a readable CSV file in UTF-8 but got: {error}") from error


def pairs_for(known: Iterable[Settings], method: str, protocol: str, shots: int, dataset: str) -> tuple[str, ...]:
    """Return the KEY VALUE pairs of a run; of several values of a key, the last one in the file counts."""
    pairs: dict[str, str] = {}
    for one in known:
        here = one.shots in (None, shots) and one.dataset in ("", dataset)
        if here and one.holds_for(method, protocol):
            pairs.update(zip(one.pairs[::2], one.pairs[1::2], strict=True))
    return tuple(part for pair in pairs.items() for part in pair)

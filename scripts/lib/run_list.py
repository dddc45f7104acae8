"""Lists of finished runs in a file: a row per run, so that runs of several machines make one table.

`scripts/compare.py` writes such a file, STEM_runs.csv, and reads those that --with names. A row has what a table
needs of a run, unrounded, and by what two runs belong together: the digest of the images, the method's recipe, and the
KEY VALUE pairs that were given.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dassl.engine import TRAINER_REGISTRY
from dassl.utils import InputError, atomic_write
from scripts.lib.methods import name_parts

METRICS = ("accuracy", "top5", "macro_f1", "ece")
NUMBERS: dict[str, Callable[[str], float]] = {
    **dict.fromkeys(("shots", "seed", "trainable", "recipe"), int),
    **dict.fromkeys(("seconds", *METRICS), float),
}
Key = tuple[str, str, int, int]  # dataset_config, method, shots, seed


class FinishedRun(NamedTuple):
    """A finished run.

    Attributes:
        dataset: what tables call the dataset.
        dataset_config: stem of its YAML in configs/datasets.
        method: what tables call the method, see `Method`.
        shots, seed: as in `Run`.
        accuracy, top5, macro_f1, ece: of the head that is shown, in percent, on the test images.
        trainable: number of trained parameters.
        seconds: of training.
        recipe: number of the method's recipe that it was made by.
        data: digest of the images; "": not known.
        options: the KEY VALUE pairs that every run of the comparison was given, with blanks between.
    """

    dataset: str
    dataset_config: str
    method: str
    shots: int
    seed: int
    accuracy: float
    top5: float
    macro_f1: float
    ece: float
    trainable: int
    seconds: float
    recipe: int
    data: str
    options: str

    @property
    def key(self) -> Key:
        """The key that tells this run from the others of a comparison."""
        return self.dataset_config, self.method, self.shots, self.seed


def write_list(runs: Iterable[FinishedRun], path: Path) -> None:
    """Write the file, in the order of the runs."""
    with atomic_write(path) as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(FinishedRun._fields)
        table.writerows(runs)


def read_lists(paths: Sequence[Path], options: str) -> dict[Key, FinishedRun]:
    """Read such files; a run that is in several of them counts as the first one says.

    Args:
        paths: the files.
        options: the KEY VALUE pairs that runs must have been given.

    Raises:
        InputError: a file is not there or no such list, a value is no number, or a run was given other KEY VALUE pairs
            or is of another recipe than the method has now.
    """
    found: dict[Key, FinishedRun] = {}
    for path in paths:
        try:
            with open(path, newline="", encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f'Expected "{path}" to be a list of runs but it cannot be read: {error}') from error
        for number, row in enumerate(rows, 2):
            run = _run_of(row, f'line {number} of "{path}"')
            if run.options != options:
                wanted = options or "no KEY VALUE pairs"
                raise InputError(
                    f'Expected line {number} of "{path}" to be of a run that was given {wanted} but it was given '
                    f"{run.options or 'none'}"
                )
            found.setdefault(run.key, run)
    return found


def _run_of(row: dict[str, str], where: str) -> FinishedRun:
    missing = [name for name in FinishedRun._fields if row.get(name) is None]
    if missing:
        raise InputError(f"Expected {where} to have the columns of STEM_runs.csv but it lacks {', '.join(missing)}")
    values: dict[str, Any] = {name: row[name] for name in FinishedRun._fields}
    for name, kind in NUMBERS.items():
        try:
            values[name] = kind(row[name])
        except ValueError as error:
            raise InputError(f"Expected {name} in {where} to be a number but got {row[name]!r}") from error
    run = FinishedRun(**values)
    trainer = name_parts(run.method).trainer
    if trainer in TRAINER_REGISTRY.registered_names():
        here = int(TRAINER_REGISTRY.get(trainer).recipe)
        if run.recipe != here:
            raise InputError(
                f"Expected {where} to be of recipe {here} of {trainer} but it is of recipe {run.recipe}, whose numbers "
                "were others: take its runs out of the file"
            )
    return run


def check_same_images(runs: Iterable[FinishedRun]) -> None:
    """Check that all runs on a dataset are of the same images, as far as is known.

    Raises:
        InputError: they are not.
    """
    first: dict[str, FinishedRun] = {}
    for run in runs:
        if run.data:
            known = first.setdefault(run.dataset_config, run)
            if known.data != run.data:
                raise InputError(
                    f"Expected all runs on {run.dataset_config} to be of the same images but {known.method}, seed "
                    f"{known.seed}, has the digest {known.data[:12]} and {run.method}, seed {run.seed}, {run.data[:12]}"
                )

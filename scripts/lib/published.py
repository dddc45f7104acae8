"""Read numbers from the literature, and put them beside those of finished runs.

They lie in published/*.csv; docs/REPRODUCE.md says what the columns are.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from dassl.utils import InputError
from scripts.lib.methods import registered_name
from scripts.lib.published_settings import SETTINGS, read_rows
from scripts.lib.runs import Run, shots_of
from scripts.lib.tables import harmonic, mean_and_band
from trainers.configs import CONFIGS, PUBLISHED

CLASSES = ("all", "base", "new", "h")  # h: the harmonic mean of base and new
TEN = (
    "caltech101", "dtd", "eurosat", "fgvc_aircraft", "food101", "oxford_flowers", "oxford_pets", "stanford_cars",
    "sun397", "ucf101",
)  # fmt: skip
AVERAGES = {"average10": TEN, "average11": (*TEN, "imagenet")}  # rows of several datasets


class Published(NamedTuple):
    """Hold a number from the literature.

    Attributes:
        dataset: stem of a file in configs/datasets, or one of AVERAGES.
        method: a registered trainer, perhaps with @VARIANT of scripts/lib/ablations.py.
        head: of the run; "": the main one.
        backbone: as MODEL.BACKBONE.NAME.
        shots: labeled images of each class; 0: none.
        classes: those that are tested on, one of CLASSES.
        accuracy: in percent.
        seeds: those of its runs; (): it does not depend on one.
        source: who has published it.
        notes: what to beware of.
    """

    dataset: str
    method: str
    head: str
    backbone: str
    shots: int
    classes: str
    accuracy: float
    seeds: tuple[int, ...]
    source: str
    notes: str


class Ours(NamedTuple):
    """Hold a number of a finished run; for the fields see Published.

    Attributes:
        shots: 0 for a zero-shot method, which looks at no training image.
        main: whether the head is the run's main one.
        classes: those that are tested on, one of CLASSES.
    """

    dataset: str
    method: str
    head: str
    backbone: str
    shots: int
    seed: int
    accuracy: float
    main: bool = True
    classes: str = "all"


def read_published(folder: Path | None = None) -> list[Published]:
    """Return all numbers in the CSV files of a folder, but for settings.csv; None: of published/.

    Raises:
        InputError: a file lacks a column, or a row has a value that cannot be right.
    """
    found: dict[tuple[object, ...], Published] = {}
    for path in sorted((folder or PUBLISHED).glob("*.csv")):
        if path.name == SETTINGS:
            continue
        for where, row in read_rows(path, Published._fields):
            one = _read_row(row, where)
            key = one[:6]
            if key in found:
                raise InputError(f"Expected one value of {' '.join(map(str, key))} but {path} has a second one")
            found[key] = one
    return list(found.values())


def _read_row(row: dict[str, str], where: str) -> Published:
    try:
        seeds = tuple(map(int, row["seeds"].split()))
        one = Published(
            row["dataset"], row["method"], row["head"], row["backbone"], int(row["shots"]), row["classes"],
            float(row["accuracy"]), seeds, row["source"], row["notes"],
        )  # fmt: skip
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"Expected numbers for shots, accuracy and seeds in {where}, but got: {error}") from error
    if one.classes not in CLASSES or not 0 <= one.accuracy <= 100 or one.shots < 0:
        raise InputError(
            f"Expected classes to be one of {', '.join(CLASSES)}, 0 to 100 percent and at least 0 shots in {where} but "
            f"got {one.classes}, {one.accuracy:g} and {one.shots}"
        )
    return one


def full_name(trainer: str, variant: str) -> str:
    """Return what a method is called among published numbers: TRAINER or TRAINER@VARIANT."""
    return f"{trainer}@{variant}" if variant else trainer


def ours_of(metrics: Mapping[str, Any], dataset: str, variant: str = "", classes: str = "all") -> list[Ours]:
    """Return the accuracy of every head of a run.

    Args:
        metrics: metrics.json of the run.
        dataset: stem of a file in configs/datasets.
        variant: of scripts/lib/ablations.py; "": none.
        classes: those that the run was tested on.
    """
    results = metrics.get(metrics.get("split", "test"), {})
    method = full_name(str(metrics["trainer"]), variant)
    rest = str(metrics["backbone"]), shots_of(metrics), int(metrics["seed"])
    return [
        Ours(dataset, method, head, *rest, values["accuracy"], head == results.get("main"), classes)
        for head, values in results.get("heads", {}).items()
    ]


def ours_in(runs: Iterable[Run]) -> list[Ours]:
    """Return the accuracy of every head of runs that were found in folders; those on a part of the classes left out."""
    stems = {registered_name(path.stem): path.stem for path in (CONFIGS / "datasets").glob("*.yaml")}
    found = []
    for run in runs:
        name = str(run.metrics["dataset"])
        if name in stems and run.dataset() == name:
            variant = run.folder.parent.name.partition("@")[2].rpartition("_")[0]  # CONFIG@VARIANT_16shots
            found += ours_of(run.metrics, stems[name], variant)
    return found


def published_records(backbone: str, names: Collection[str], published: Iterable[Published]) -> list[dict[str, Any]]:
    """Return records for the figure of accuracy by shots: published numbers with a backbone, on named datasets.

    Args:
        backbone: as MODEL.BACKBONE.NAME.
        names: registered names of datasets.
        published: the numbers; averages of datasets are left out.
    """
    found = []
    for one in published:
        if one.backbone != backbone or one.classes != "all" or one.dataset in AVERAGES:
            continue
        name, head = registered_name(one.dataset), f" {one.head}" if one.head else ""
        if name in names:
            found.append(
                {"dataset": name, "method": f"{one.method}{head} (published)", "shots": one.shots, "seed": None,
                 "accuracy": one.accuracy}
            )  # fmt: skip
    return found


class Pair(NamedTuple):
    """Hold our values by seed, in percent, beside a published one."""

    known: Published
    values: tuple[float, ...]

    @property
    def difference(self) -> float:
        """Our mean minus the published value."""
        return statistics.fmean(self.values) - self.known.accuracy

    @property
    def verdict(self) -> str:
        """Say whether the published value is within our spread over seeds; "": with one seed there is none."""
        if len(self.values) < 2:
            return ""
        mean, half = mean_and_band(self.values)
        return "inside" if abs(mean - self.known.accuracy) <= half else "outside"


def pairs(ours: Iterable[Ours], published: Iterable[Published]) -> list[Pair]:
    """Return the published accuracies that our runs have a number for, each with ours by seed.

    An average is ours where all of its datasets are there, over the seeds that all of them have. A harmonic mean is
    that of a seed's accuracies, or averages, on base and on new classes. What trains nothing has one seed for all.
    """
    values: dict[tuple[object, ...], dict[int, float]] = {}
    for run in ours:
        for head in {run.head, "" if run.main else run.head}:
            key = (run.dataset, run.method, head, run.backbone, run.shots, run.classes)
            values.setdefault(key, {})[run.seed] = run.accuracy

    def by_seed(known: Published, classes: str) -> dict[int, float]:
        datasets = AVERAGES.get(known.dataset, (known.dataset,))
        parts = [values.get((dataset, *known[1:5], classes), {}) for dataset in datasets]
        seeds = sorted(set(parts[0]).intersection(*parts[1:]))
        return {seed: statistics.fmean(part[seed] for part in parts) for seed in seeds}

    found = []
    for known in published:
        if known.classes == "h":
            base, new = by_seed(known, "base"), by_seed(known, "new")
            mine = {seed: harmonic(base[seed], new[seed]) for seed in base if seed in new}
        else:
            mine = by_seed(known, known.classes)
        if mine:
            found.append(Pair(known, tuple(mine.values())))
    return found


PAIR_COLUMNS = (
    "dataset", "method", "shots", "classes", "ours (sd)", "seeds", "published", "difference", "our interval", "source",
)  # fmt: skip


def pair_rows(found: Iterable[Pair]) -> list[list[str]]:
    """Return rows under PAIR_COLUMNS."""
    rows = []
    for pair in found:
        known = pair.known
        sd = f" ({statistics.stdev(pair.values):.1f})" if len(pair.values) > 1 else ""
        rows.append(
            [
                known.dataset, known.method + (f"/{known.head}" if known.head else ""), str(known.shots), known.classes,
                f"{statistics.fmean(pair.values):.1f}{sd}", str(len(pair.values)), f"{known.accuracy:.1f}",
                f"{pair.difference:+.1f}", pair.verdict, "; ".join(filter(None, (known.source, known.notes))),
            ]
        )  # fmt: skip
    return rows


def pair_table(found: Sequence[Pair]) -> str:
    """Return Markdown of our numbers beside published ones; "": there are none."""
    if not found:
        return ""
    align = ("left", "left", "right", "left", *["right"] * 4, "left", "left")
    table = tabulate(pair_rows(found), PAIR_COLUMNS, tablefmt="pipe", disable_numparse=True, colalign=align)
    return f"### beside published numbers (accuracy, %)\n\n{table}\n"

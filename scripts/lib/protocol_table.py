"""The table of each protocol, made of the finished runs of its plan."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dassl.utils import atomic_write
from scripts.lib.protocol_plan import Cell
from scripts.lib.tables import AVERAGE, SPREAD, Cells, Record, collect, comma_separated, harmonic, latex, markdown

HARMONIC = "H"
LISTED = {  # entries of `suspicious` in metrics.json -> names of the tables of label-noise
    "precision": "precision of the list",
    "precision_above": "precision of what cleaning doubts",
    "recall_above": "recall of what cleaning doubts",
}
KWAY = "classes taken as new ones"
ZEROSHOT, ZEROSHOT_HEAD = "ZeroshotCLIP", "clip"
NOTES = {
    "few-shot": "test accuracy (%)",
    "base2new": (
        "test accuracy (%) on the base classes, which were trained on, and on the new ones; H = 2bn/(b+n) of each "
        "seed, then the mean over seeds (in the average over datasets: H of each seed's averages)"
    ),
    "cross-dataset": "test accuracy (%) on the source, which was trained on, and on other datasets as it is",
    "ood": (
        "test accuracy (%) on the source, which was trained on, and under shift, by the classifier trained there; "
        "where a test set has some of its classes only, its columns are cut to these"
    ),
    "ablation": "test accuracy (%) of each head",
    "label-noise": (
        "test accuracy (%) by the share of training images with a wrong label, or of another dataset; precision of the "
        "list: which share (%) of the most suspicious training images, as many as are wrong, are wrong, which is the "
        "recall, too; precision and recall (%) also of the images whose labels cleaning doubts"
    ),
    "transductive": (
        "accuracy (%) on sets of test images that are classified together, without training images: tasks with very "
        "low (1-4), low (2-10), medium (5-25), high (25-50) and very high (50-100) numbers of classes, of 64 or 1000 "
        "images, as far as there are so many; all test images; and streams with low to high correlation, or class by "
        "class. Seeds draw the sets. ZeroshotCLIP is zero-shot CLIP on the same sets"
    ),
}


def head_values(metrics: dict[str, Any], kway: bool = False) -> dict[str, float]:
    """Return the accuracy of each head, the method's own last.

    With `kway` it is the accuracy with the classes taken as new ones, where the run has that, too.
    """
    results = metrics[metrics["split"]]
    heads = results["heads_kway"] if kway and results.get("heads_kway") else results["heads"]
    values = {head: value["accuracy"] for head, value in heads.items()}
    main = results["main"]
    return {**{head: value for head, value in values.items() if head != main}, main: values[main]}


def _rows(method: str, values: dict[str, float], all_heads: bool) -> Iterator[tuple[str, float]]:
    """Yield (row, value) of the method's own head.

    With `all_heads`, yield every head of a method that has more than its own and zero-shot CLIP.
    """
    if not all_heads or len(values) <= 2:
        yield method, list(values.values())[-1]
        return
    for head, value in values.items():
        yield f"{method} {head}", value


def read(plan: Sequence[Cell]) -> list[tuple[Cell, dict[str, Any]]]:
    """Return the cells whose run is finished, each with the run's metrics.json."""
    metrics = {run: run.metrics() for run in dict.fromkeys(cell.run for cell in plan)}
    return [(cell, found) for cell in plan if (found := metrics[cell.run]) is not None]


def records_of(
    done: Sequence[tuple[Cell, dict[str, Any]]], all_heads: bool = False, kway: bool = False
) -> list[Record]:
    """Return the records that the cells show."""
    records = []
    for cell, metrics in done:
        values = head_values(metrics, kway)
        if cell.column is None:
            found: list[tuple[str, Any, float]] = [(cell.row, head, value) for head, value in values.items()]
        else:
            found = [(row, cell.column, value) for row, value in _rows(cell.row, values, all_heads)]
        records += [Record(cell.block, row, column, cell.seed, value) for row, column, value in found]
    return records


def with_harmonic(cells: Cells) -> Cells:
    """Return the cells and, where both are there, H = 2bn/(b+n) of base and new, seed by seed."""
    found: Cells = {}
    for (block, row, column), values in cells.items():
        found[block, row, column] = values
        base = cells.get((block, row, "base"), {})
        if column == "new" and base.keys() & values.keys():
            seeds = sorted(base.keys() & values.keys())
            found[block, row, HARMONIC] = {s: harmonic(base[s], values[s]) for s in seeds}
    return found


def with_average(cells: Cells, targets: Sequence[str]) -> Cells:
    """Add the mean of a row's targets behind them, seed by seed; return the cells.

    A row gets a mean where there are several targets and none is missing.
    """
    rows = dict.fromkeys((block, row) for block, row, _ in cells)
    for block, row in rows if len(targets) > 1 else ():
        parts = [cells.get((block, row, target), {}) for target in targets]
        common = sorted(set(parts[0]).intersection(*parts[1:]))
        if common:
            cells[block, row, AVERAGE] = {seed: statistics.fmean(part[seed] for part in parts) for seed in common}
    return cells


def noise_cells(done: Sequence[tuple[Cell, dict[str, Any]]], all_heads: bool) -> Cells:
    """Return the cells of label-noise: accuracy, averaged over datasets for each number of shots, and lists' quality.

    These are the lists of suspicious images. Frozen features make them, so that methods with the same prompts have the
    same.
    """
    by_shots: dict[str, list[tuple[Cell, dict[str, Any]]]] = {}
    for cell, metrics in done:
        by_shots.setdefault(cell.block.partition(", ")[2], []).append((cell, metrics))
    found: Cells = {}
    for shots, some in by_shots.items():
        for (block, row, column), values in collect(records_of(some, all_heads)).items():
            found[f"{AVERAGE}, {shots}" if block == AVERAGE else block, row, column] = values
    for cell, metrics in done:
        for entry, title in LISTED.items():
            value = metrics.get("suspicious", {}).get(entry)
            if value is not None and cell.column is not None:
                row = cell.row.partition("@")[0]  # variants have the same list
                found.setdefault((f"{cell.block}, {title}", row, cell.column), {})[cell.seed] = value
    return found


def with_zeroshot(done: Sequence[tuple[Cell, dict[str, Any]]]) -> list[Record]:
    """Return the records of zero-shot CLIP, which every method reports on its sets of images, and then the methods'."""
    zeroshot: dict[tuple[Any, ...], Record] = {}
    for cell, metrics in done:
        assert cell.column is not None
        record = Record(cell.block, ZEROSHOT, cell.column, cell.seed, head_values(metrics)[ZEROSHOT_HEAD])
        zeroshot.setdefault((record.dataset, record.shots, record.seed), record)
    return [*zeroshot.values(), *records_of(done)]


def cells_of(protocol: str, plan: Sequence[Cell], targets: Sequence[str], all_heads: bool) -> Cells:
    """Return the cells of the protocol's tables; there are none where no run is finished."""
    done = read(plan)
    if protocol == "transductive":
        return collect(with_zeroshot(done))
    cells = collect(records_of(done, all_heads))
    if protocol == "base2new":
        return with_harmonic(cells)
    if protocol == "label-noise":
        return noise_cells(done, all_heads)
    if protocol in ("cross-dataset", "ood"):
        cells = with_average(cells, targets)
        # A further table has the test sets with some of the classes, these taken as new ones, which is what CoOp
        # reports. Methods whose classes do not see each other have the same number in both tables.
        partial = {cell.column for cell, metrics in done if metrics[metrics["split"]].get("heads_kway")}
        some = [(cell, metrics) for cell, metrics in done if cell.column in partial]
        for (block, row, column), values in collect(records_of(some, all_heads, kway=True)).items():
            cells[f"{block}, {KWAY}", row, column] = values
    return cells


def write_tables(cells: Cells, note: str, command: str, stem: Path) -> str:
    """Write STEM.md, .csv and .tex; return the Markdown."""
    text = f"{note}; {SPREAD}\n\n    {command}\n\n{markdown(cells)}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".md", text), (".csv", comma_separated(cells)), (".tex", latex(cells))):
        with atomic_write(stem.with_name(stem.name + suffix)) as stream:
            stream.write(content)
    return text

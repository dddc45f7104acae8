"""Compare one method with the best other one, seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from tabulate import tabulate

from dassl.utils import InputError
from scripts.lib.tables import LEVEL, Cells, Column, Values, paired_p


def wins_ties_losses(ours: Values, other: Values, higher: bool = True) -> tuple[int, int, int]:
    """Return at how many of the common seeds the first method is ahead, level and behind."""
    sign = 1 if higher else -1
    differences = [sign * (ours[seed] - other[seed]) for seed in ours.keys() & other.keys()]
    wins, losses = sum(d > 1e-9 for d in differences), sum(d < -1e-9 for d in differences)
    return wins, len(differences) - wins - losses, losses


def lead_table(cells: Cells, method: str, higher: bool = True) -> str:
    """Return a Markdown table of the method against the best other method, by dataset and number of shots.

    Columns: both means over the seeds that both have, their difference, p of the paired t-test, at how many seeds the
    method wins, ties and loses, and how many of the other methods it is significantly better and worse than.

    Raises:
        InputError: the method has no finished run, or no other method has one.
    """
    rows = []
    for dataset, column in dict.fromkeys((dataset, column) for dataset, _, column in cells):
        others = {m: v for (d, m, c), v in cells.items() if (d, c) == (dataset, column) and m != method}
        ours = cells.get((dataset, method, column))
        if ours is not None and others:
            rows.append(_row(dataset, column, ours, others, higher))
    if not rows:
        raise InputError(f"Expected finished runs of {method} and of another method to compare but there are none")
    heads = ["dataset", "shots", method, "best other", "", "difference", "p", "wins/ties/losses", "better/worse than"]
    align = ["left", "right", "right", "left", *["right"] * 5]
    table = tabulate(rows, heads, tablefmt="pipe", disable_numparse=True, colalign=align)
    return f"### {method} against the best other method\n\n{table}\n"


def _row(dataset: str, column: Column, ours: Values, others: Mapping[str, Values], higher: bool) -> list[str]:
    sign = 1 if higher else -1
    best = max(others, key=lambda name: sign * statistics.fmean(others[name].values()))
    common = sorted(ours.keys() & others[best].keys())
    mine, its = ([values[seed] for seed in common] for values in (ours, others[best]))
    tested = [
        statistics.fmean(sign * (ours[seed] - values[seed]) for seed in ours.keys() & values.keys())
        for values in others.values()
        if ours.keys() & values.keys() and paired_p(ours, values) < LEVEL
    ]
    if not common:
        return [dataset, str(column), f"{statistics.fmean(ours.values()):.1f}", best, *["no common seed"] * 5]
    return [
        dataset,
        str(column),
        f"{statistics.fmean(mine):.1f}",
        best,
        f"{statistics.fmean(its):.1f}",
        f"{statistics.fmean(mine) - statistics.fmean(its):+.1f}",
        f"{paired_p(ours, others[best]):.3f}",
        "/".join(map(str, wins_ties_losses(ours, others[best], higher))),
        f"{sum(d > 0 for d in tested)}/{sum(d < 0 for d in tested)} of {len(others)}",
    ]

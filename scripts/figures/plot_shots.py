"""Accuracy by number of training images per class: a panel per dataset and one for their average.

    python scripts/figures/plot_shots.py output/ [NAME=FOLDER ...] [--csv published.csv] [--heads cma final] [--band sd]

Reads metrics.json of every finished run below the folders, at any depth; NAME=FOLDER gives the runs in it another name
than their trainer's. Folders of runs that have not finished are named on stderr and left out. The columns of a CSV file
of published numbers are `dataset,method,shots,accuracy` and, with one line per run, `seed`; accuracy in percent,
shots 0 for zero-shot, -1 for all images.

Lines are means over seeds; bands are the 95 % t-interval of the mean (or one standard deviation, `--band sd`), where
there are at least two seeds; of two seeds, the range of both. The average is taken over the datasets that every method
has.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Patch

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dassl.utils.cli import fail, run_main
from scripts.figures.style import COLUMN, GRAY, PAGE, add_output_options, look, new_figure, readable, save, style
from scripts.lib.published import published_records, read_published
from scripts.lib.runs import find_runs, read_records, run_records
from scripts.lib.tables import BANDS, OF_TWO, mean_and_band

MAX_COLUMNS = 4


class Point(NamedTuple):
    """One number of shots of one method."""

    shots: int
    mean: float
    half: float  # half the height of the band; nan where there is one value only
    n: int  # values


class Panel(NamedTuple):
    """Hold what one panel shows."""

    title: str
    series: dict[str, list[Point]]  # method -> points, fewest shots first, -1 (all images) last


def shots_panels(records: Iterable[Mapping[str, Any]], band: str = "t95") -> list[Panel]:
    """Return the panels of the figure: the average, where there are several datasets, and each dataset in order.

    Args:
        records: {dataset, method, shots, seed, accuracy}; `seed` None: a mean that was published as such.
        band: "t95" or "sd", see mean_and_band.

    Raises:
        ValueError: there is no record, or one is there twice.
    """
    cells: dict[str, dict[str, dict[int, dict[Any, float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for record in records:
        dataset, method, shots, seed, accuracy = (
            record[key] for key in ("dataset", "method", "shots", "seed", "accuracy")
        )
        cell = cells[dataset][method][max(shots, -1)]
        if seed in cell:
            raise ValueError(f"Expected one accuracy of {method} on {dataset}, {shots} shots, seed {seed} but got two")
        cell[seed] = float(accuracy)
    if not cells:
        raise ValueError("Expected at least one accuracy to show but got none")
    panels = [
        Panel(dataset, {method: _points(by_shots, band) for method, by_shots in methods.items()})
        for dataset, methods in cells.items()
    ]
    methods = list(dict.fromkeys(method for panel in panels for method in panel.series))
    shared = [dataset for dataset in cells if all(method in cells[dataset] for method in methods)]
    if len(shared) > 1:
        average = {method: _points(_average([cells[d][method] for d in shared]), band) for method in methods}
        panels.insert(0, Panel(f"Average of {len(shared)} datasets", {m: p for m, p in average.items() if p}))
    return panels


def _points(by_shots: Mapping[int, Mapping[Any, float]], band: str) -> list[Point]:
    order = sorted(by_shots, key=lambda shots: math.inf if shots < 0 else shots)
    return [Point(k, *mean_and_band(list(by_shots[k].values()), band), len(by_shots[k])) for k in order]


def _average(datasets: Sequence[Mapping[int, Mapping[Any, float]]]) -> dict[int, dict[Any, float]]:
    """Return shots -> seed -> mean over datasets, for shots that all have, over the seeds that all have.

    Where no seed is in all of them (published means) there is one value, the mean of the datasets' means.
    """
    averages: dict[int, dict[Any, float]] = {}
    for shots in set.intersection(*(set(d) for d in datasets)):
        cells = [d[shots] for d in datasets]
        seeds = [seed for seed in cells[0] if all(seed in cell for cell in cells)]
        averages[shots] = {seed: statistics.fmean(cell[seed] for cell in cells) for seed in seeds}
        if not seeds:
            averages[shots] = {None: statistics.fmean(statistics.fmean(cell.values()) for cell in cells)}
    return averages


def shots_figure(
    records: Iterable[Mapping[str, Any]], band: str = "t95", *, columns: int | None = None, baseline: str = ""
) -> Figure:
    """Draw accuracy by shots, a panel per dataset; `style.save` writes the figure.

    Args:
        records: {dataset, method, shots, seed, accuracy (percent)}; see shots_panels. Methods are drawn, and listed in
            the legend, in the order of their first record.
        band: "t95" or "sd", see mean_and_band.
        columns: panels beside each other; None: up to four, so that rows are filled well.
        baseline: a method to draw in gray, on top of those that have no training images.

    Raises:
        ValueError: see shots_panels.
    """
    panels = shots_panels(records, band)
    methods = list(dict.fromkeys(method for panel in panels for method in panel.series))
    columns = columns or _columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    width = COLUMN if len(panels) == 1 else PAGE
    legend_columns = max(1, min(len(methods) + 1, int(width / 1.7)))
    legend_rows = math.ceil((len(methods) + 1) / legend_columns)
    height = rows * min(2.3, max(1.7, 0.8 * width / columns)) + 0.3 + 0.16 * legend_rows
    with style():
        figure = new_figure(width, height)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw(axes, panel, methods, baseline)
        for axes in grid.flat[len(panels) :]:
            axes.remove()  # its figure is None from now on
        for column in range(columns):
            bottom = [axes for axes in grid[:, column] if axes.figure is not None]
            bottom[-1].set_xlabel("training images per class")
        for axes in grid[:, 0]:
            axes.set_ylabel("accuracy (%)")
        handles: dict[str, Any] = {}
        for axes in figure.axes:
            handles.update(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        entries = [handles[readable(method)] for method in methods if readable(method) in handles]
        values = {p.n for panel in panels for points in panel.series.values() for p in points}
        if max(values) > 1:
            label = BANDS[band] + (OF_TWO if band == "t95" and 2 in values else "")
            entries.append(Patch(color=GRAY, alpha=0.3, label=label))
        figure.legend(handles=entries, loc="outside lower center", ncols=legend_columns, handlelength=3)
    return figure


def _columns(panels: int) -> int:
    """Return how many panels beside each other leave the fewest places empty, more before fewer."""
    if panels <= MAX_COLUMNS:
        return panels
    return min(range(MAX_COLUMNS, MAX_COLUMNS - 2, -1), key=lambda columns: -panels % columns)


def _draw(axes: Any, panel: Panel, methods: Sequence[str], baseline: str) -> None:
    shown = sorted({p.shots for points in panel.series.values() for p in points if p.shots >= 0})
    positive = [shots for shots in shown if shots > 0]
    places = {shots: math.log2(shots) for shots in positive}
    places[0] = (places[positive[0]] if positive else 0.0) - 1.0
    places[-1] = (places[positive[-1]] if positive else 0.0) + 1.0
    for number, method in enumerate(methods):
        points = panel.series.get(method)
        if not points:
            continue
        color, marker, line = look(number)
        color = GRAY if method == baseline else color
        x, y = [places[p.shots] for p in points], [p.mean for p in points]
        if [p.shots for p in points] == [0]:  # zero-shot: its line is there to compare with
            axes.axhline(y[0], color=color, linewidth=0.8, linestyle=":")
            axes.plot(x, y, color=color, marker="*", markersize=8, linestyle="none", label=readable(method))
            continue
        axes.plot(x, y, color=color, marker=marker, linestyle=line, label=readable(method), zorder=3)
        banded = [(a, p.mean - p.half, p.mean + p.half) for a, p in zip(x, points, strict=True) if p.n > 1]
        if len(banded) > 1:
            axes.fill_between(*zip(*banded, strict=True), color=color, alpha=0.13, linewidth=0)
            for edge in (1, 2):  # bands that overlap are told apart by their edges
                axes.plot([b[0] for b in banded], [b[edge] for b in banded], color=color, linestyle=line, linewidth=0.4)
        elif banded:
            axes.vlines(*banded[0], color=color, alpha=0.5, linewidth=3)
    drawn = {p.shots for points in panel.series.values() for p in points}
    ticks = sorted(drawn, key=lambda shots: places[shots])
    axes.set_xticks([places[s] for s in ticks], ["all" if s < 0 else str(s) for s in ticks])
    axes.set_title(readable(panel.title, 36))
    axes.margins(x=0.08)
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 101.0))  # a band may reach beyond what an accuracy can be


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="folders that hold run folders, or NAME=FOLDER")
    parser.add_argument("--csv", nargs="+", type=Path, default=[], help="files of published numbers")
    parser.add_argument(
        "--published", default="", metavar="BACKBONE", help="add what published/ has with this backbone"
    )
    parser.add_argument("--heads", nargs="+", default=[], help="heads to draw in the place of each run's accuracy")
    parser.add_argument("--band", choices=tuple(BANDS), default="t95", help="what the bands are (default: t95)")
    add_output_options(parser, "figures/accuracy_by_shots")
    args = parser.parse_args(argv)
    try:
        runs, unfinished = find_runs(args.folders)
        for folder in unfinished:
            print(f"left out, not finished: {folder}", file=sys.stderr)
        records = run_records(runs, args.heads) + [record for path in args.csv for record in read_records(path)]
        if args.published:
            names = {str(record["dataset"]) for record in records}
            records += published_records(args.published, names, read_published())
        figure = shots_figure(records, args.band)
        for path in save(figure, args.output or Path("figures/accuracy_by_shots"), args.formats):
            print(path)
    except (ValueError, OSError) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

"""Training curves of a run: losses, accuracy, learning rate, and what the method tells of itself.

    python scripts/figures/plot_curves.py RUN

Reads the event files in RUN/tensorboard. Losses and training accuracy are means over each epoch; a name with `mean`,
`min` and `max` (DLR-CLIP's alpha and weight) is a line in a band, and so are more than five numbers of one kind (its
adapters' scales); the rest is drawn step by step.
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dassl.utils.cli import run_main
from scripts.figures.command import figure_main
from scripts.figures.style import COLUMN, PAGE, look, new_figure, readable, style
from scripts.lib.runs import read_metrics

TITLES = {"lr": "learning rate", "weight": "fusion weight w", "alpha": "gate α", "res_scale": "residual scale"}
MANY = 5  # more lines than this are drawn as their mean in a band
LEFT_OUT = ("images_per_second",)  # tells of the machine, not of the method


class Line(NamedTuple):
    """A line, with a band where low and high are given; all arrays are of one length."""

    epochs: np.ndarray  # 1.0: the end of the first epoch
    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def read_scalars(run: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read tag -> (steps, values) from a run's event files.

    Raises:
        ValueError: there are none.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    folder = run / "tensorboard"
    if not any(folder.glob("events.out.tfevents.*")):
        raise ValueError(f"Expected event files in {folder}, which a run that trains writes, but there are none")
    kept = {"scalars": 0, "images": 1, "tensors": 1, "histograms": 1, "audio": 1, "compressedHistograms": 1}
    events = EventAccumulator(str(folder), size_guidance=kept)  # 0: all
    events.Reload()
    scalars = {}
    for tag in sorted(events.Tags()["scalars"]):
        points = {event.step: event.value for event in events.Scalars(tag)}  # a step made twice: the last counts
        steps = sorted(points)
        scalars[tag] = np.array(steps), np.array([points[step] for step in steps], dtype=np.float64)
    return scalars


def curve_panels(
    scalars: Mapping[str, tuple[np.ndarray, np.ndarray]], epochs: int, terms: Sequence[str]
) -> dict[str, dict[str, Line]]:
    """Return panel -> name -> line; the losses come first. What has one point only is left out.

    Args:
        scalars: tag -> (steps, values); those below `train/` are drawn, and heads' accuracies on `val`.
        epochs: number of epochs that the run trained for.
        terms: names of what is averaged over an epoch; "acc" is a panel of its own, the others are losses.

    Raises:
        ValueError: nothing was logged in training, it has one step only, or `epochs` is below 1.
    """
    train = {tag.removeprefix("train/"): points for tag, points in scalars.items() if tag.startswith("train/")}
    if not train or epochs < 1:
        raise ValueError("Expected a run that trained but its event files tell of no training step")
    per_epoch = (1 + max(int(steps[-1]) for steps, _ in train.values())) / epochs
    losses: dict[str, Line] = {}
    panels = {"loss": losses, "training accuracy (%)": {}, "validation accuracy (%)": {}, "learning rate": {}}
    groups: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name in sorted(train, key=lambda name: (name != "loss", name)):
        steps, values = train[name]
        if name in terms:
            last = np.append(np.diff((steps / per_epoch).astype(int)) > 0, True)  # an epoch's last: its running mean
            panel = panels["training accuracy (%)"] if name == "acc" else losses
            panel[name] = Line((steps[last] + 1) / per_epoch, values[last])
        elif name not in LEFT_OUT:
            group, _, member = name.rpartition("/")
            groups.setdefault(group or name, {})[member] = train[name]
    for group, members in groups.items():
        title = TITLES.get(group, group.replace("_", " ").replace("/", ", "))
        if {"mean", "min", "max"} <= members.keys():
            (steps, mean), low, high = members["mean"], members["min"][1], members["max"][1]
            panels[f"{title} (mean, min to max)"] = {"mean": Line((steps + 1) / per_epoch, mean, low, high)}
        elif len(members) > MANY and len({len(steps) for steps, _ in members.values()}) == 1:
            steps, values = next(iter(members.values()))[0], np.stack([values for _, values in members.values()])
            line = Line((steps + 1) / per_epoch, values.mean(0), values.min(0), values.max(0))
            panels[f"{title} (mean, min to max of {len(members)})"] = {"mean": line}
        else:
            panels.setdefault(title, {}).update(
                (name, Line((steps + 1) / per_epoch, values)) for name, (steps, values) in members.items()
            )
    for tag, (steps, values) in scalars.items():
        split, _, rest = tag.partition("/")
        head, slash, metric = rest.partition("/")
        if split == "val" and slash and metric == "accuracy" and len(steps) > 1:
            panels["validation accuracy (%)"][head] = Line(steps + 1.0, values)
    drawn = {
        title: {name: line for name, line in lines.items() if len(line.epochs) > 1} for title, lines in panels.items()
    }
    if not any(drawn.values()):
        raise ValueError("Expected a run of several steps but it trained in one, which makes no curve")
    return {title: lines for title, lines in drawn.items() if lines}


def curves_figure(panels: Mapping[str, Mapping[str, Line]]) -> Figure:
    """Draw the figure of the panels that `curve_panels` returns."""
    columns = min(len(panels), 4 if len(panels) in (4, 7, 8) else 3)
    rows = math.ceil(len(panels) / columns)
    with style():
        figure = new_figure(COLUMN if columns == 1 else PAGE, 1.75 * rows + 0.2)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
            _draw(axes, title, lines)
        for axes in grid.flat[len(panels) :]:
            axes.remove()  # its figure is None from now on
        for column in range(columns):
            [axes for axes in grid[:, column] if axes.figure is not None][-1].set_xlabel("epoch")
    return figure


def _draw(axes: Any, title: str, lines: Mapping[str, Line]) -> None:
    axes.set_title("\n".join(textwrap.wrap(readable(title), 30)), fontsize=7)
    for number, (name, line) in enumerate(lines.items()):
        color, marker, dashes = look(number)
        marked = 1 < len(lines) <= MANY
        axes.plot(
            line.epochs, line.values, color=color, linestyle=dashes, linewidth=0.9, label=readable(name),
            marker=marker if marked else "", markersize=2.5, markevery=max(1, len(line.epochs) // 8),
        )  # fmt: skip
        if line.low is not None and line.high is not None:
            axes.fill_between(line.epochs, line.low, line.high, color=color, alpha=0.2, linewidth=0)
    everything = np.concatenate([line.values for line in lines.values()])
    positive = everything[everything > 0]
    if title == "loss" and len(positive) == len(everything) and positive.max() > 50 * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter("")
    if len(lines) > 1:
        axes.legend(fontsize=5.5, handlelength=2.4, labelspacing=0.2)


def run_curves(run: Path) -> Figure:
    """Draw the curves of a finished run, given its folder."""
    if not (run / "DONE").is_file():
        raise ValueError(f"Expected a finished run but {run} has no DONE")
    metrics = read_metrics(run / "metrics.json")
    return curves_figure(curve_panels(read_scalars(run), int(metrics.get("epochs", 0)), list(metrics.get("train", {}))))


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(__doc__ or "", "curves", lambda args: run_curves(args.run), argv)


if __name__ == "__main__":
    sys.exit(run_main(main))

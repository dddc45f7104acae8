"""Confusion among the most confused classes, before and after adaptation.

    python scripts/figures/plot_confusion.py RUN [--classes 10] [--before clip] [--after final]

The classes with most errors, counted over both heads so that the choice favors neither: images of the class that went
elsewhere, and others' images that came to it. All remaining classes are one row and one column, "other"; an image of
one of them that is taken for another of them is in the cell other / other. Each row is in percent of its true class.
Reads predictions.safetensors of the run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dassl.evaluation.predictions import Predictions
from dassl.utils.cli import run_main
from scripts.figures.command import figure_main, open_predictions
from scripts.figures.style import PAGE, new_figure, readable, style

COUNTED = 14  # more cells in a row than this leave no room for numbers


def most_confused(counts: Sequence[np.ndarray], number: int) -> list[int]:
    """Return the classes with most errors over all matrices [C, C], in label order; ties go to the lower labels."""
    total = np.sum(counts, axis=0)
    errors = total.sum(0) + total.sum(1) - 2 * total.diagonal()
    return sorted(np.argsort(-errors, kind="stable")[:number].tolist())


def shares_among(counts: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Return percentages of each row's images, [k, k], or [k + 1, k + 1] with the rest of the classes last.

    Args:
        counts: [C, C], rows true, columns predicted.
        classes: k labels.
    """
    group = np.full(len(counts), len(classes))
    group[list(classes)] = np.arange(len(classes))
    size = len(classes) + (len(classes) < len(counts))
    grouped = np.zeros((size, size))
    np.add.at(grouped, (group[:, None].repeat(len(counts), 1), group[None, :].repeat(len(counts), 0)), counts)
    return 100.0 * grouped / np.maximum(grouped.sum(1, keepdims=True), 1)


def confusion_figure(predictions: Predictions, number: int = 10, before: str = "", after: str = "") -> Figure:
    """Draw the confusion among the most confused classes, a panel per head.

    Args:
        predictions: of a run.
        number: how many classes to show by name.
        before, after: heads; "": the method's reference head (without one there is one panel), and its main head.
    """
    if number < 1:
        raise ValueError(f"Expected at least one class to show but got {number}")
    after = after or predictions.main
    before = before or predictions.reference
    heads = [head for head in dict.fromkeys((before, after)) if head]
    counts = [predictions.confusion(head) for head in heads]
    classes = most_confused(counts, number)
    names = [readable(predictions.classnames[c], 18) for c in classes]
    tables = [shares_among(count, classes) for count in counts]
    if len(tables[0]) > len(classes):
        names.append("other")
    with style():
        side = min(max(0.2 * len(names), 1.6), 2.9)
        margin = 0.35 + 0.058 * max(map(len, names))
        figure = new_figure(min(PAGE, margin + (side + 0.15) * len(heads) + 0.6), side + margin + 0.3)
        grid = figure.subplots(1, len(heads), squeeze=False, sharey=True)[0]
        for axes, head, table in zip(grid, heads, tables, strict=True):
            drawn = _draw(axes, table, names)
            when = "" if len(heads) == 1 else "before: " if head == before else "after: "
            axes.set_title(f"{when}{head}, {100 * predictions.correct(head).mean():.1f} % correct")
        grid[0].set_ylabel("true class")
        figure.colorbar(drawn, ax=list(grid), label="% of the true class", fraction=0.03, pad=0.02, shrink=0.8)
    return figure


def _draw(axes: Any, table: np.ndarray, names: Sequence[str]) -> Any:
    drawn = axes.imshow(table, vmin=0, vmax=100, cmap="Blues", interpolation="nearest")
    axes.grid(False)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6.5)
    axes.set_yticks(range(len(names)), names, fontsize=6.5)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted class")
    if len(names) <= COUNTED:
        for row, column in np.ndindex(table.shape):
            if table[row, column] >= 0.5:
                color = "white" if table[row, column] > 55 else "black"
                axes.text(column, row, f"{table[row, column]:.0f}", ha="center", va="center", fontsize=5.5, color=color)
    return drawn


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--classes", type=int, default=10, help="how many classes to name (default: 10)")
    parser.add_argument("--before", default="", help="head (default: the method's reference, zero-shot CLIP)")
    parser.add_argument("--after", default="", help="head (default: the one that is the method's accuracy)")


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(
        __doc__ or "",
        "confusion",
        lambda args: confusion_figure(open_predictions(args.run), args.classes, args.before, args.after),
        argv,
        _options,
    )


if __name__ == "__main__":
    sys.exit(run_main(main))

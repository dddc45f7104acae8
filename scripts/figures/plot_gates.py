"""Histograms of what a method decides image by image: DLR-CLIP's gate alpha and fusion weight w.

    python scripts/figures/plot_gates.py RUN [--head final]

Images that the head classifies correctly and those that it does not are drawn apart, each in percent of their own
number. Reads predictions.safetensors of the run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dassl.evaluation.predictions import Predictions
from dassl.utils.cli import run_main
from scripts.figures.command import figure_main, open_predictions
from scripts.figures.style import COLORS, COLUMN, PAGE, new_figure, readable, style

TITLES = {"alpha": "gate α", "weight": "fusion weight w", "trust": "trust r"}
BINS = 30


def gate_bins(values: np.ndarray) -> np.ndarray:
    """Return edges [BINS + 1] over the range of the values.

    The range is made at least 0.02 wide, so that a constant does not look like noise.
    """
    low, high = float(values.min()), float(values.max())
    middle, half = (low + high) / 2, max((high - low) / 2, 0.01)
    return np.linspace(middle - half, middle + half, BINS + 1)


def gates_figure(predictions: Predictions, head: str = "") -> Figure:
    """Draw a panel per value that the method tells of each image.

    Raises:
        ValueError: the method tells none.
    """
    head = head or predictions.main
    correct = predictions.correct(head)
    if not predictions.values:
        raise ValueError("Expected a run of a method that tells alpha or w of each image but this one tells nothing")
    with style():
        count = len(predictions.values)
        figure = new_figure(COLUMN if count == 1 else PAGE, 2.2)
        grid = figure.subplots(1, count, squeeze=False, sharey=True)[0]
        for axes, (name, values) in zip(grid, predictions.values.items(), strict=True):
            bins = gate_bins(values)
            for chosen, what in ((correct, "correct"), (~correct, "wrong")):
                part = values[chosen]
                if not len(part):
                    continue
                weights = np.full(len(part), 100.0 / len(part))
                label = f"{head} {what} ({len(part):,} images)"
                if what == "correct":
                    axes.hist(part, bins, weights=weights, color=COLORS[0], alpha=0.55, label=label)
                else:
                    axes.hist(
                        part, bins, weights=weights, histtype="step", color=COLORS[1], linestyle="--", linewidth=1.1,
                        label=label,
                    )  # fmt: skip
            axes.axvline(values.mean(), color="black", linewidth=0.8, linestyle=":", label="mean")
            title = TITLES.get(name, readable(name))
            axes.set_title(f"{title}: mean {values.mean():.3f}, {values.min():.3f} to {values.max():.3f}")
            axes.set_xlabel(title)
        grid[0].set_ylabel("images (%)")
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3 if count > 1 else 1)
    return figure


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head", default="", help="whose errors to tell apart (default: the method's accuracy)")


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(
        __doc__ or "", "gates", lambda args: gates_figure(open_predictions(args.run), args.head), argv, _options
    )


if __name__ == "__main__":
    sys.exit(run_main(main))

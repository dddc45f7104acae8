"""Draw how far the true class's logit is from its strongest rival's, for each head.

    python scripts/figures/plot_logits.py RUN [--heads clip cma glr final]

The strongest rival is the largest logit of another class: an image is classified correctly where the true class is
above it. Reads predictions.safetensors of the run.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dassl.evaluation.predictions import Predictions
from dassl.utils.cli import run_main
from scripts.figures.command import figure_main, open_predictions
from scripts.figures.style import COLORS, COLUMN, PAGE, new_figure, style

HEADS = ("clip", "cma", "glr", "final")
BINS = 40


class Logits(NamedTuple):
    """Hold what one panel shows of a head."""

    true: np.ndarray  # [N]
    rival: np.ndarray  # [N]
    accuracy: float  # percent
    margin: float  # median of true - rival


def head_logits(predictions: Predictions, head: str) -> Logits:
    """Return the true and rival logits of a head."""
    row = predictions.head(head)
    true, rival = predictions.true[row], predictions.rival[row]
    accuracy = 100.0 * float(predictions.correct(head).mean())
    return Logits(true, rival, accuracy, float(np.median(true.astype(np.float64) - rival)))


def logits_figure(predictions: Predictions, heads: Sequence[str] = ()) -> Figure:
    """Draw a panel per head; without any given, those of HEADS that there are, else the first four."""
    shown = list(heads) or [h for h in HEADS if h in predictions.heads] or predictions.heads[:4]
    found = [head_logits(predictions, head) for head in shown]
    if len(predictions.classnames) < 2:
        raise ValueError("Expected at least two classes but got one, which has no rival")
    everything = np.concatenate([part for logits in found for part in (logits.true, logits.rival)])
    bins = np.histogram_bin_edges(everything, BINS)
    columns = min(len(shown), 4)
    rows = math.ceil(len(shown) / columns)
    with style():
        figure = new_figure(COLUMN if columns == 1 else PAGE, 0.5 + 1.7 * rows)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes, head, logits in zip(grid.flat, shown, found, strict=False):
            weights = np.full(len(logits.true), 100.0 / len(logits.true))
            axes.hist(logits.true, bins, weights=weights, color=COLORS[0], alpha=0.55, label="true class")
            axes.hist(
                logits.rival, bins, weights=weights, histtype="step", color=COLORS[1], linewidth=1.1, linestyle="--",
                label="strongest rival",
            )  # fmt: skip
            axes.set_title(f"{head}: {logits.accuracy:.1f} % correct,\nmedian margin {logits.margin:+.2f}")
        for axes in grid.flat[len(shown) :]:
            axes.remove()
        for axes in grid[:, 0]:
            axes.set_ylabel("images (%)")
        for axes in figure.axes:
            axes.set_xlabel("logit")
            axes.label_outer()
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heads", nargs="+", default=[], help="heads to show (default: clip cma glr final)")


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(
        __doc__ or "", "logits", lambda args: logits_figure(open_predictions(args.run), args.heads), argv, _options
    )


if __name__ == "__main__":
    sys.exit(run_main(main))

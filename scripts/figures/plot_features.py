"""t-SNE of test images' features, a panel per branch, colored by class.

    python scripts/figures/plot_features.py RUN [--classes 10] [--seed 0]

Features are normalized, as CLIP compares them. In each title stands the mean silhouette of the features themselves, by
cosine distance: from -1 to 1, higher where images are nearer to their own class than to the next one; t-SNE's distances
between clusters mean little. A run keeps the features of at most 2,000 test images of at most 20 classes, drawn by its
seed, in predictions.safetensors.
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
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dassl.evaluation.predictions import Predictions
from dassl.utils.cli import run_main
from scripts.figures.command import figure_main, open_predictions
from scripts.figures.style import COLORS, COLUMN, PAGE, new_figure, readable, style

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")  # filled ones, which may also be hollow


class Branch(NamedTuple):
    """Hold what one panel shows."""

    features: np.ndarray  # [M, E], normalized
    points: np.ndarray  # [M, 2]
    silhouette: float


def chosen_images(predictions: Predictions, number: int) -> np.ndarray:
    """Return positions along the kept images: those of the `number` classes that have most of them."""
    labels = predictions.labels[predictions.rows]
    classes, counts = np.unique(labels, return_counts=True)
    kept = classes[np.argsort(-counts, kind="stable")[:number]]
    return np.flatnonzero(np.isin(labels, kept))


def embed(features: np.ndarray, labels: np.ndarray, seed: int = 0) -> Branch:
    """Embed features [M, E], whose classes are labels [M], in two dimensions by t-SNE."""
    lengths = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    unit = (features / np.maximum(lengths, 1e-12)).astype(np.float32)
    # On normalized vectors Euclidean neighbors are cosine neighbors. The start by PCA keeps panels comparable.
    tsne = TSNE(init="pca", perplexity=min(30.0, (len(unit) - 1) / 3), random_state=seed, n_jobs=1)
    points = tsne.fit_transform(unit)
    classes = len(np.unique(labels))
    silhouette = silhouette_score(unit, labels, metric="cosine") if 1 < classes < len(labels) else math.nan
    return Branch(unit, points, float(silhouette))


def features_figure(predictions: Predictions, number: int = 10, seed: int = 0) -> Figure:
    """Draw the t-SNE of the kept features, a panel per branch.

    Args:
        predictions: of a run.
        number: how many classes to show.
        seed: of t-SNE.

    Raises:
        ValueError: the run kept no features, or those of fewer than five images.
    """
    if not predictions.features:
        raise ValueError("Expected a run that keeps image features of its branches but this one has none")
    inside = chosen_images(predictions, number)
    if len(inside) < 5:
        raise ValueError(f"Expected features of at least five images but got {len(inside)}")
    labels = predictions.labels[predictions.rows][inside]
    classes = np.unique(labels).tolist()
    with style():
        count = len(predictions.features)
        width = COLUMN if count == 1 else PAGE
        legend_columns = max(1, int(width / 1.4))
        legend_rows = math.ceil(len(classes) / legend_columns)
        figure = new_figure(width, 0.95 * min(width / count, 3.4) + 0.2 + 0.16 * legend_rows)
        grid = figure.subplots(1, count, squeeze=False)[0]
        for axes, (name, features) in zip(grid, predictions.features.items(), strict=True):
            branch = embed(features[inside], labels, seed)
            for place, label in enumerate(classes):
                color = COLORS[place % len(COLORS)]
                hollow = place >= len(COLORS)  # the colors come round again
                axes.scatter(
                    *branch.points[labels == label].T,
                    s=10, linewidths=0.7 if hollow else 0.25, facecolors="none" if hollow else color,
                    edgecolors=color if hollow else "#444444", marker=_MARKERS[place % len(_MARKERS)],
                    label=readable(predictions.classnames[label], 22),
                )  # fmt: skip
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"{readable(name)}: silhouette {branch.silhouette:.2f}, {len(inside)} images")
        handles, names = grid[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=legend_columns, markerscale=1.4)
    return figure


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--classes", type=int, default=10, help="how many classes to show (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of t-SNE (default: 0)")


def main(argv: Sequence[str] | None = None) -> int:
    return figure_main(
        __doc__ or "",
        "features",
        lambda args: features_figure(open_predictions(args.run), args.classes, args.seed),
        argv,
        _options,
    )


if __name__ == "__main__":
    sys.exit(run_main(main))

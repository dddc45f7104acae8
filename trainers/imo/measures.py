"""Measure how well cosine similarity tells pairs of images of one class from pairs of two: overlap and variance.

Legend: N images, E width of the joint embedding, K bins of a histogram over [-1, 1].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BINS = 200
CHUNK = 1024  # images compared with all others at a time


class Measures(NamedTuple):
    """The result of `measure`.

    Attributes:
        overlap: shared area of the two histograms, 0 (apart) to 1 (no separation).
        variance: variance of the normalized features over images, mean over their dimensions.
        same, different: histograms [K] of the pairs of one class, and of two classes: the share of the pairs in each
            bin. Each sums to 1.
    """

    overlap: float
    variance: float
    same: Tensor
    different: Tensor


def measure(features: Tensor, labels: Tensor, bins: int = BINS) -> Measures:
    """Measure overlap and histograms of all pairs of different images, and the variance of their features.

    Args:
        features: [N, E], of any length.
        labels: [N].
        bins: K.

    Raises:
        ValueError: there is no pair of one class, or none of two classes.
    """
    features = F.normalize(features.float(), dim=-1)
    same, different = (torch.zeros(bins, dtype=torch.long) for _ in range(2))
    position = torch.arange(len(features), device=features.device)
    for rows in position.split(CHUNK):
        cosine = features[rows] @ features.t()  # [chunk, N]
        where = ((cosine + 1) * (bins / 2)).long().clamp(0, bins - 1)
        later = position[None, :] > rows[:, None]  # every pair once
        alike = labels[rows][:, None] == labels[None, :]
        same += torch.bincount(where[later & alike], minlength=bins).cpu()
        different += torch.bincount(where[later & ~alike], minlength=bins).cpu()
    if not int(same.sum()) or not int(different.sum()):
        raise ValueError("Expected pairs of images of one class and of two classes but got only one of both kinds")
    p, q = same.double() / same.sum(), different.double() / different.sum()
    variance = float(features.double().var(dim=0, correction=0).mean())
    return Measures(float(torch.minimum(p, q).sum()), variance, p, q)


def draw_histograms(before: Measures, after: Measures, title: str = "") -> Any:
    """Draw a Matplotlib figure of both histograms, before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for ax, name, measures in zip(axes, ("before", "after"), (before, after), strict=True):
        centres = (torch.arange(len(measures.same)) + 0.5) * 2 / len(measures.same) - 1
        for share, label in ((measures.same, "same class"), (measures.different, "different classes")):
            ax.fill_between(centres.numpy(), share.numpy(), step="mid", alpha=0.5, label=label)
        ax.set_title(f"{name}: overlap {measures.overlap:.3f}, variance {1000 * measures.variance:.3f}e-3", fontsize=9)
        ax.set_xlabel("cosine similarity")
    used = torch.stack([before.same, before.different, after.same, after.different]).sum(dim=0).nonzero()
    low = float(used.min()) * 2 / len(before.same) - 1
    axes[0].set_xlim(low, 1.0)
    axes[0].set_ylabel("share of the pairs")
    axes[0].legend(fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure

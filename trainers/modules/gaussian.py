"""Describe classes as Gaussians with one common spread.

Legend: V views, N images, C classes, E width of the features. Sums are in float64, whatever the features are in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Return the number of images of each class, [C], for labels [N].

    Raises:
        ValueError: a class has no image.
    """
    counts = labels.bincount(minlength=num_classes)
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        raise ValueError(f"Expected training images of all {num_classes} classes but got none of {missing[:5]}")
    return counts


def class_sums(images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the sum of the features [N, E], float64, of each class's images, [C, E]; 0 where it has none."""
    # A product, not index_add, whose sums on a GPU depend on the order in which threads arrive.
    return F.one_hot(labels, num_classes).double().t() @ images


def class_means(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the mean of each class over its images and their views, [C, E], float64.

    Args:
        values: [V, N, E].
        labels: [N].

    Raises:
        ValueError: a class has no image.
    """
    counts = class_counts(labels, num_classes)
    return class_sums(values.mean(dim=0, dtype=torch.float64), labels, num_classes) / counts[:, None]


def pooled_scatter(values: Tensor, labels: Tensor, means: Tensor) -> Tensor:
    """Return the sum over all views of (x - mean of its class)(x - mean of its class)^T, [E, E], float64.

    Args:
        values: [V, N, E].
        labels: [N].
        means: [C, E], float64.
    """
    scatter, own = means.new_zeros(means.shape[1], means.shape[1]), means[labels]
    for view in values:  # one at a time, as float64 takes twice the memory
        apart = view.double() - own
        scatter += apart.t() @ apart
    return scatter

"""Describe classes as Gaussians with one common spread.

Legend: V views, N images, C classes, E width of the features. Sums are in float64, whatever the features are in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_SPREAD = 1e-10  # mean squared distance that is told from rounding; features have length 1


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


def precision_matrix(scatter: Tensor, n: int) -> Tensor:
    """Return P [E, E], for the scatter [E, E] of n views.

    Without any spread (one image of each class in one view), all directions count alike: P = I. GDA's
    source has a pseudo-inverse, which is zero there.
    """
    width, ridge = len(scatter), scatter.trace() / max(n - 1, 1)
    identity = torch.eye(width, dtype=scatter.dtype, device=scatter.device)
    if float(ridge) <= LEAST_SPREAD:
        return identity
    return width * torch.cholesky_inverse(torch.linalg.cholesky(scatter + ridge * identity))


def linear(means: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Return W [C, E] and b + log(C) [C], for means [C, E] and P [E, E]."""
    weight = means @ inverse
    return weight, -(weight * means).sum(dim=1) / 2

"""Compute distances between the rows of two matrices [M, D] and [N, D]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dassl.utils import check_availability


def compute_distance_matrix(input1: Tensor, input2: Tensor, metric: str = "euclidean") -> Tensor:
    """Return the distances [M, N] between the rows of two matrices.

    Args:
        input1: rows [M, D].
        input2: rows [N, D].
        metric: "euclidean" (squared) or "cosine" (1 - cosine similarity).
    """
    check_availability(metric, ["euclidean", "cosine"])
    if input1.dim() != 2 or input2.dim() != 2 or input1.shape[1] != input2.shape[1]:
        raise ValueError(f"Expected matrices [M, D] and [N, D] but got {tuple(input1.shape)} and {tuple(input2.shape)}")
    return euclidean_squared_distance(input1, input2) if metric == "euclidean" else cosine_distance(input1, input2)


def euclidean_squared_distance(input1: Tensor, input2: Tensor) -> Tensor:
    """Return the squared Euclidean distances [M, N]: |a|^2 + |b|^2 - 2 a.b, never below 0."""
    norms = input1.pow(2).sum(dim=1, keepdim=True) + input2.pow(2).sum(dim=1)  # [M, 1] + [N]
    return torch.addmm(norms, input1, input2.t(), beta=1.0, alpha=-2.0).clamp_min(0.0)  # rounding can fall below 0


def cosine_distance(input1: Tensor, input2: Tensor) -> Tensor:
    """Return 1 - cosine similarity [M, N]."""
    return 1.0 - F.normalize(input1, dim=1) @ F.normalize(input2, dim=1).t()

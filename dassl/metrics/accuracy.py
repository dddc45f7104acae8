"""Compute the top-k accuracy of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def compute_accuracy(output: Tensor | Sequence[Tensor], target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
    """Return the percentage of rows whose label is among the k highest scores, for each k.

    Args:
        output: scores [B, C]; of a tuple or list, the first element.
        target: labels [B].
        topk: the values of k, each in [1, C].

    Returns:
        One tensor of shape [1] for each k.
    """
    scores = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(scores, Tensor) or scores.dim() != 2 or target.shape != scores.shape[:1]:
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"Expected scores [B, C] and labels [B] but got {shape} and {tuple(target.shape)}")
    if not topk or min(topk) < 1 or max(topk) > scores.shape[1]:
        raise ValueError(f"Expected each k of topk to be in [1, {scores.shape[1]}] but got {tuple(topk)}")
    best = scores.topk(max(topk), dim=1).indices  # [B, K], best first
    hit = best == target.unsqueeze(1)
    if hit.shape[1] == 1:  # the usual case, in every training step
        return [hit.float().mean().mul(100.0).reshape(1) for _ in topk]
    return [hit[:, :k].any(dim=1).float().mean().mul(100.0).reshape(1) for k in topk]

"""Classify images by a cache: features of training images as keys, their labels as values.

Legend: n images, N keys, C classes, G strengths of the keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

AT_ONCE = 2**24  # most numbers in the logits of the grid points that are evaluated at once


def cache_logits(
    affinity: Tensor, key_labels: Tensor, num_classes: int, beta: float, strength: Tensor | None = None
) -> Tensor:
    """Return the cache's logits exp(-beta (1 - affinity)) V, where V is given as labels.

    Args:
        affinity: [n, N], cosine similarities of images and keys.
        key_labels: [N], the classes of the keys.
        strength: what each key counts, [N] or, for G logits at once, [G, 1, N]; None: all count 1.

    Returns:
        logits [n, C], or [G, n, C].
    """
    weights = torch.exp(-beta * (1 - affinity))
    if strength is not None:
        weights = weights * strength
    return weights.new_zeros(*weights.shape[:-1], num_classes).index_add(-1, key_labels, weights)


def cache_accuracy(
    clip_logits: Tensor,
    affinity: Tensor,
    key_labels: Tensor,
    labels: Tensor,
    betas: Sequence[float],
    alphas: Sequence[float],
    strengths: Tensor,
) -> Tensor:
    """Return the accuracy (percent) of clip_logits + alpha cache at every point of a grid, [betas, alphas, G].

    Args:
        clip_logits: [n, C]. affinity: [n, N]. key_labels: [N]. labels: [n].
        strengths: what each key counts, [G, N].
    """
    out = torch.zeros(len(betas), len(alphas), len(strengths), dtype=torch.float64)
    each = max(clip_logits.numel() * len(alphas), affinity.numel())
    weights = torch.tensor(alphas).to(clip_logits)[:, None, None, None]
    for i, beta in enumerate(betas):
        first = 0
        for some in strengths[:, None].split(max(1, AT_ONCE // each)):
            cache = cache_logits(affinity, key_labels, clip_logits.shape[1], beta, some)
            hits = ((clip_logits + weights * cache).argmax(dim=-1) == labels).double().mean(dim=-1)  # [alphas, g]
            out[i, :, first : first + len(some)] = 100 * hits.cpu()
            first += len(some)
    return out

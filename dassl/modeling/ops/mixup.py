"""Mixup (Zhang et al., 2018)."""

from __future__ import annotations

import torch
from torch import Tensor


def mixup(
    x1: Tensor, x2: Tensor, y1: Tensor, y2: Tensor, beta: float, preserve_order: bool = False
) -> tuple[Tensor, Tensor]:
    """Return each pair of images [B, C, H, W] and of label rows [B, K], mixed by a share drawn from Beta(beta, beta).

    Args:
        x1, x2, y1, y2: the pairs.
        beta: parameter of the distribution.
        preserve_order: give the first of each pair the larger share.
    """
    share = torch.distributions.Beta(beta, beta).sample((len(x1),)).to(x1.device)  # [B]
    if preserve_order:
        share = torch.maximum(share, 1 - share)
    of_images, of_labels = share.view(-1, 1, 1, 1), share.view(-1, 1)
    return torch.lerp(x2, x1, of_images), torch.lerp(y2, y1, of_labels)

"""Cross-entropy with smoothed labels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(input: Tensor, target: Tensor, label_smooth: float = 0, reduction: str = "mean") -> Tensor:
    """Return torch's cross-entropy of logits [B, C] and labels [B]; ``label_smooth`` goes to all classes alike."""
    return F.cross_entropy(input, target, label_smoothing=label_smooth, reduction=reduction)

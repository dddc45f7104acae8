"""Standardize the logits of each image, so that only what distinguishes its classes counts.

Legend: B images, C classes.
"""

from __future__ import annotations

from torch import Tensor


def standardized(logits: Tensor) -> Tensor:
    """Return logits [B, C] with mean 0 and standard deviation 1 over the classes of each image; of one class: 0."""
    centered = logits - logits.mean(dim=1, keepdim=True)
    if logits.shape[1] == 1:  # it has no standard deviation
        return centered
    return centered / logits.std(dim=1, keepdim=True).clamp(min=1e-12)

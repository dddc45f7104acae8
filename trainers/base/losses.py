"""Measure how wrong logits are: by cross-entropy, or by a loss that wrong labels move less."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .keys import key

LOSSES = ("ce", "mae")


@dataclass(frozen=True)
class LossKeys:
    """Keys of OPTIM of all methods that are trained by cross-entropy."""

    loss: str = key(
        "ce",
        "what takes the place of cross-entropy in training: ce (nothing), or mae, the mean absolute error of "
        "probabilities, which wrong labels move less",
        choices=LOSSES,
    )


def class_loss(logits: Tensor, labels: Tensor, kind: str = "ce") -> Tensor:
    """Return the mean over images of the cross-entropy (ce), or of |softmax(logits) - one-hot label| (mae).

    The mean absolute error of an image is 2 - 2 p, with p the probability of its label. Its gradient fades where p is
    near 0, as it is for a wrong label: Ghosh et al., Robust Loss Functions under Label Noise for Deep Neural Networks,
    2017; Pan et al., NLPrompt, 2025 (section 3.2), trains prompts by it.

    Args:
        logits: [B, C].
        labels: [B].
        kind: one of LOSSES.
    """
    if kind == "ce":
        return F.cross_entropy(logits, labels)
    p = torch.softmax(logits.float(), dim=1).gather(1, labels.unsqueeze(1))
    return 2 * (1 - p).mean()

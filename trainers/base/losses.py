"""Measure how wrong logits are: by cross-entropy, or by a loss that wrong labels move less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .keys import key

LOSSES = ("ce", "mae")
WEIGHTS = ("none", "balanced")


@dataclass(frozen=True)
class LossKeys:
    """Keys of OPTIM of all methods that are trained by cross-entropy."""

    loss: str = key(
        "ce",
        "what takes the place of cross-entropy in training: ce (nothing), or mae, the mean absolute error of "
        "probabilities, which wrong labels move less",
        choices=LOSSES,
    )
    class_weights: str = key(
        "none",
        "what an image counts in this loss: none (all the same), or balanced, where each class counts the same "
        "however many images it has",
        choices=WEIGHTS,
    )


def check_plain_loss(optim: Any, method: str, weighs_classes: bool = False) -> None:
    """Refuse, in a node OPTIM, another loss and (unless it weighs them) weights of classes for a method without such.

    Raises:
        ValueError: one of them is there.
    """
    for name, usual, lack in (("LOSS", "ce", "no other loss"), ("CLASS_WEIGHTS", "none", "no weights of classes")):
        if optim.get(name, usual) != usual and not (weighs_classes and name == "CLASS_WEIGHTS"):
            raise ValueError(
                f"Expected OPTIM.{name} to be {usual} for {method}, which takes {lack}, but got {optim[name]!r}"
            )


def balanced_weights(labels: Sequence[int], classes: int, device: torch.device | None = None) -> Tensor | None:
    """Return what an image of each class counts, [C], so that all classes count the same; the mean over images is 1.

    Args:
        labels: of the N training images.
        classes: C. An image of a class with n images counts N / (number of classes with images * n).
        device: where the weights go.

    Returns:
        The weights; None where all are 1.
    """
    counts = torch.bincount(torch.tensor(labels), minlength=classes).double()
    present = counts > 0
    if len(counts[present].unique()) == 1:
        return None
    weights = torch.zeros(classes, dtype=torch.float64)
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights.float().to(device)


def class_loss(logits: Tensor, labels: Tensor, kind: str = "ce", weights: Tensor | None = None) -> Tensor:
    """Return the mean over images of the cross-entropy (ce), or of |softmax(logits) - one-hot label| (mae).

    The mean absolute error of an image is 2 - 2 p, with p the probability of its label. Its gradient fades where p is
    near 0, as it is for a wrong label: Ghosh et al., Robust Loss Functions under Label Noise for Deep Neural Networks,
    2017; Pan et al., NLPrompt, 2025 (section 3.2), trains prompts by it.

    Args:
        logits: [B, C].
        labels: [B].
        kind: one of LOSSES.
        weights: what an image of each class counts, [C]; None: 1.
    """
    if kind == "ce":
        if weights is None:
            return F.cross_entropy(logits, labels)
        each = F.cross_entropy(logits, labels, reduction="none")
    else:
        each = 2 * (1 - torch.softmax(logits.float(), dim=1).gather(1, labels.unsqueeze(1))).squeeze(1)
    return each.mean() if weights is None else (weights[labels] * each).mean()


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of the named losses of a step, []; a single one is returned as it is, which saves its gradient."""
    losses = list(terms.values())
    if len(losses) == 2:  # the same number, in fewer operations
        return losses[0] + losses[1]
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

"""Labels, orders and schedules of semi-supervised learning."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sharpen_prob(p: Tensor, temperature: float = 2) -> Tensor:
    """Return the rows of probabilities [B, C] to the power of ``temperature``, normalized."""
    return F.normalize(p**temperature, p=1, dim=1)


def reverse_index(data: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return data and labels in reverse order."""
    return data.flip(0), label.flip(0)


def shuffle_index(data: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return data and labels in one random order, drawn from torch's default generator."""
    order = torch.randperm(len(data))
    return data[order], label[order]


def create_onehot(label: Tensor, num_classes: int) -> Tensor:
    """Return labels [B] as one-hot rows [B, num_classes], float32, on the labels' device."""
    return F.one_hot(label.long(), num_classes).float()


def sigmoid_rampup(current: float, rampup_length: float) -> float:
    """Return exp(-5 (1 - current / rampup_length)^2) with ``current`` kept within 0..rampup_length."""
    return math.exp(-5.0 * (1.0 - linear_rampup(current, rampup_length)) ** 2)


def linear_rampup(current: float, rampup_length: float) -> float:
    """Return current / rampup_length, kept within 0..1."""
    if rampup_length <= 0:
        raise ValueError(f"Expected the length of a ramp to be above 0 but got {rampup_length}")
    return float(min(max(current / rampup_length, 0.0), 1.0))


@torch.no_grad()
def ema_model_update(model: nn.Module, ema_model: nn.Module, alpha: float) -> None:
    """Move the parameters of ``ema_model`` towards those of ``model``: alpha of the old, 1 - alpha of the new."""
    for average, parameter in zip(ema_model.parameters(), model.parameters(), strict=True):
        average.lerp_(parameter, 1 - alpha)

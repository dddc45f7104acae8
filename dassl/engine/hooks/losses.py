"""Running means of what forward_backward returns, and the check that the losses are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .base import HookBase


def as_numbers(summary: Mapping[str, Any] | None) -> dict[str, float]:
    """What forward_backward returned, with one-element tensors and the like turned into plain numbers."""
    return {
        name: float(value.detach() if isinstance(value, Tensor) else value) for name, value in (summary or {}).items()
    }


def check_finite(trainer: Any, summary: Mapping[str, float]) -> None:
    """Raise a FloatingPointError naming the loss and the place when a value called "...loss..." is not finite.

    The trainer's own backward checks the loss too; this also covers methods that bring their own backward.
    """
    for name, value in summary.items():
        if "loss" in name.lower() and not math.isfinite(value):
            raise FloatingPointError(f"Expected {name} to be finite but got {value} at {trainer.where()}")


class Losses(HookBase):
    """Keeps ``trainer.stats.losses`` and the means of the last epoch."""

    def __init__(self) -> None:
        self.means: dict[str, float] = {}

    def after_step(self, trainer: Any) -> None:
        check_finite(trainer, trainer.stats.summary)
        trainer.stats.losses.update(trainer.stats.summary)
        self.means = {name: meter.avg for name, meter in trainer.stats.losses.meters.items()}

    def state_dict(self, trainer: Any) -> dict[str, Any]:
        return {"means": self.means}

    def load_state_dict(self, trainer: Any, state: dict[str, Any]) -> None:
        self.means = dict(state["means"])

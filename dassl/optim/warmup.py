"""Warm-up as schedules around another schedule, for code that builds upstream's by hand.

``build_lr_scheduler`` does not use them: it makes warm-up and schedule one function of the position, which resumes.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["ConstantWarmupScheduler", "LinearWarmupScheduler"]


class _Warmup(LRScheduler):
    """A schedule with rates of its own for ``warmup_epoch`` epochs, then those of ``successor``, counted from there."""

    def __init__(self, optimizer: Optimizer, successor: LRScheduler, warmup_epoch: int, last_epoch: int = -1) -> None:
        self.successor, self.warmup_epoch = successor, warmup_epoch
        super().__init__(optimizer, last_epoch)

    def rate(self, base: float) -> float:
        """Return the rate of the warm-up at the present position for a base rate."""
        raise NotImplementedError

    def get_lr(self) -> list[Any]:
        """Return the rates at the present position, one for each parameter group."""
        if self.last_epoch >= self.warmup_epoch:
            return [float(base) for base in self.successor.base_lrs]
        return [self.rate(float(base)) for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Advance by one epoch: the warm-up's, or the successor's once the warm-up is over."""
        if self.last_epoch < self.warmup_epoch:
            super().step(epoch)
        else:
            self.successor.step(epoch)
            self._last_lr = self.successor.get_last_lr()


class ConstantWarmupScheduler(_Warmup):
    """Warm up at the rate ``cons_lr``."""

    def __init__(self, optimizer: Optimizer, successor: LRScheduler, warmup_epoch: int, cons_lr: float,
                 last_epoch: int = -1, verbose: bool = False) -> None:  # fmt: skip
        self.cons_lr = cons_lr
        super().__init__(optimizer, successor, warmup_epoch, last_epoch)

    def rate(self, base: float) -> float:
        """Return ``cons_lr``."""
        return self.cons_lr


class LinearWarmupScheduler(_Warmup):
    """Warm up from ``min_lr`` linearly to the base rate."""

    def __init__(self, optimizer: Optimizer, successor: LRScheduler, warmup_epoch: int, min_lr: float,
                 last_epoch: int = -1, verbose: bool = False) -> None:  # fmt: skip
        self.min_lr = min_lr
        super().__init__(optimizer, successor, warmup_epoch, last_epoch)

    def rate(self, base: float) -> float:
        """Return ``min_lr`` at first, then the base rate times the share of the warm-up that is done."""
        return self.min_lr if self.last_epoch == 0 else base * self.last_epoch / self.warmup_epoch

"""Learning-rate schedules with an optional warm-up, as functions of the number of steps taken.

The rate at position t is computed from t alone, not from the rate before it. So a resumed run has the rates of an
uninterrupted one, and what a checkpoint holds of a schedule is one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dassl.config import CfgNode
from dassl.upstream_names import upstream_name
from dassl.utils import InputError, check_availability

__all__ = ["AVAI_SCHEDS", "AVAI_UNITS", "AVAI_WARMUPS", "ClosedFormLR", "StepwiseLR", "build_lr_scheduler"]

AVAI_SCHEDS = ["single_step", "multi_step", "cosine"]
AVAI_WARMUPS = ["linear", "constant"]
AVAI_UNITS = ["epoch", "step"]

Curve = Callable[[int], float]  # position -> multiple of the base rate
Rate = Callable[[int, float], float]  # position, base rate -> rate


class ClosedFormLR(LRScheduler):
    """A schedule that sets each parameter group's rate to ``rate(t, base rate)``; t = positions advanced so far.

    Args:
        optimizer: the optimizer; its present rates are the base rates.
        rate: position and base rate -> rate.
    """

    def __init__(self, optimizer: Optimizer, rate: Rate) -> None:
        self._rate = rate
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Return the rates at the present position, one for each parameter group."""
        return [self._rate(self.last_epoch, float(base)) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the rates there for human readers; plain numbers only."""
        return {"last_epoch": self.last_epoch, "_last_lr": [float(lr) for lr in self.get_last_lr()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the position of ``state_dict`` and set the optimizer's rates to those of this schedule there.

        The curve itself (length, milestones, base rates) stays that of the present config: a run that is resumed with
        more epochs follows the longer curve.
        """
        self.last_epoch = int(state_dict["last_epoch"])
        self._apply()

    def go_to_epoch(self, epoch: int) -> None:
        """Take up the position after ``epoch`` epochs; this schedule counts epochs."""
        self.load_state_dict({"last_epoch": epoch})

    def _apply(self) -> None:
        rates = self.get_lr()
        for group, base, rate in zip(self.optimizer.param_groups, self.base_lrs, rates, strict=True):
            group["initial_lr"] = base  # these two entries may come from an optimizer state loaded before
            group["lr"] = rate
        self._last_lr = rates


class StepwiseLR(ClosedFormLR):
    """A ClosedFormLR that advances by itself with every step of the optimizer; calls of ``step`` change nothing.

    So a trainer that updates the rate once per epoch, as upstream's do, gets a schedule per step unchanged.

    Args:
        optimizer: the optimizer; its present rates are the base rates.
        make_rate: steps per epoch -> the rate function.
    """

    def __init__(self, optimizer: Optimizer, make_rate: Callable[[int], Rate]) -> None:
        self._make_rate = make_rate
        self._steps_per_epoch: int | None = None
        self._epochs_before = 0  # epochs done before a checkpoint that told no position
        self._started = False
        super().__init__(optimizer, make_rate(1))  # position 0 is the same for every length
        self._started = True
        optimizer.register_step_post_hook(self._advance)

    def set_steps_per_epoch(self, count: int) -> None:
        """Tell how many optimizer steps an epoch has; whoever runs the loop calls this before the first step."""
        if count < 1:
            raise ValueError(f"Expected at least one step per epoch but got {count}")
        self._steps_per_epoch = count
        self._rate = self._make_rate(count)
        if self._epochs_before:
            self.last_epoch, self._epochs_before = self._epochs_before * count, 0
        self._apply()

    def go_to_epoch(self, epoch: int) -> None:
        """Take up the position after ``epoch`` epochs, once the number of steps in an epoch is known."""
        self._epochs_before = epoch
        if self._steps_per_epoch is not None:
            self.load_state_dict({"last_epoch": epoch * self._steps_per_epoch})

    def step(self, epoch: int | None = None) -> None:
        """Do nothing: the optimizer's steps advance this schedule."""
        if not self._started:  # the base class sets the first rate by calling this method
            super().step()

    def _advance(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._steps_per_epoch is None:
            raise RuntimeError('Expected set_steps_per_epoch to be called before training with OPTIM.LR_UNIT "step"')
        self.last_epoch += 1
        self._apply()


def build_lr_scheduler(optimizer: Optimizer, optim_cfg: CfgNode, steps_per_epoch: int | None = None) -> ClosedFormLR:
    """Build the schedule that ``optim_cfg`` describes: a main curve, after a warm-up if WARMUP_EPOCH > 0.

    LR_UNIT "epoch": one ``step`` call is one unit, in which MAX_EPOCH, STEPSIZE and WARMUP_EPOCH count. LR_UNIT "step":
    the unit is a step of the optimizer, with which the schedule advances by itself; STEPSIZE and WARMUP_EPOCH count
    steps, and MAX_EPOCH is converted to them.

    The main curve starts at the full rate right after the warm-up. With WARMUP_RECOUNT the curve counts from 0 there
    and keeps its length, so a cosine does not reach zero within MAX_EPOCH. Without WARMUP_RECOUNT the curve goes on
    from where it would have been, scaled such that it begins at the full rate, and a cosine does reach zero.

    Args:
        optimizer: the optimizer to steer.
        optim_cfg: the OPTIM node (``cfg.OPTIM``).
        steps_per_epoch: optimizer steps in an epoch, for LR_UNIT "step"; None: the loop tells the schedule later, by
            ``set_steps_per_epoch``.

    Raises:
        InputError: an unknown schedule, warm-up or unit, or a length that is not positive.
    """
    unit = optim_cfg.get("LR_UNIT", "epoch")  # a config written for upstream has no such key
    check_availability(unit, AVAI_UNITS)
    check_availability(optim_cfg.LR_SCHEDULER, AVAI_SCHEDS)
    if optim_cfg.WARMUP_EPOCH > 0:
        check_availability(optim_cfg.WARMUP_TYPE, AVAI_WARMUPS)
    if optim_cfg.MAX_EPOCH < 1:
        raise InputError(f"Expected OPTIM.MAX_EPOCH to be at least 1 but got {optim_cfg.MAX_EPOCH}")
    if unit == "epoch":
        return ClosedFormLR(optimizer, _make_rate(optim_cfg, 1))
    scheduler = StepwiseLR(optimizer, partial(_make_rate, optim_cfg.clone()))
    if steps_per_epoch is not None:
        scheduler.set_steps_per_epoch(steps_per_epoch)
    return scheduler


def _make_rate(optim_cfg: CfgNode, units_per_epoch: int) -> Rate:
    """Combine warm-up and main curve in one rate function."""
    curve = _main_curve(optim_cfg, optim_cfg.MAX_EPOCH * units_per_epoch)
    warmup = optim_cfg.WARMUP_EPOCH
    if warmup <= 0:
        return lambda t, base: base * curve(t)
    if optim_cfg.WARMUP_TYPE == "constant":
        start: Rate = partial(_constant_warmup, optim_cfg.WARMUP_CONS_LR)
    else:
        start = partial(_linear_warmup, optim_cfg.WARMUP_MIN_LR, warmup)
    after = _recounted(curve, warmup) if optim_cfg.WARMUP_RECOUNT else _continued(curve, warmup)
    return lambda t, base: start(t, base) if t < warmup else base * after(t)


def _main_curve(optim_cfg: CfgNode, length: int) -> Curve:
    steps = optim_cfg.STEPSIZE
    gamma = optim_cfg.GAMMA
    if optim_cfg.LR_SCHEDULER == "cosine":
        return partial(_cosine, length)
    if optim_cfg.LR_SCHEDULER == "single_step":
        size = steps[-1] if isinstance(steps, (list, tuple)) else steps
        if not isinstance(size, int):
            raise InputError(f"Expected OPTIM.STEPSIZE to end in an integer but got {steps}")
        return partial(_single_step, size if size > 0 else length, gamma)
    if not isinstance(steps, (list, tuple)) or not all(isinstance(step, int) and step > 0 for step in steps):
        raise InputError(f"Expected OPTIM.STEPSIZE to be positive integers for multi_step but got {steps}")
    return partial(_multi_step, tuple(steps), gamma)


def _cosine(length: int, t: int) -> float:
    """Return the half cosine that falls from 1 at t = 0 to 0 at t = length; 0 beyond."""
    return 0.5 * (1.0 + math.cos(math.pi * min(t, length) / length))


def _single_step(size: int, gamma: float, t: int) -> float:
    return gamma ** (t // size)


def _multi_step(milestones: tuple[int, ...], gamma: float, t: int) -> float:
    return gamma ** sum(milestone <= t for milestone in milestones)


def _constant_warmup(rate: float, t: int, base: float) -> float:
    return rate


def _linear_warmup(least: float, warmup: int, t: int, base: float) -> float:
    return least if t == 0 else base * t / warmup


def _recounted(curve: Curve, warmup: int) -> Curve:
    return lambda t: curve(t - warmup)


def _continued(curve: Curve, warmup: int) -> Curve:
    begin = curve(warmup)
    return lambda t: curve(t) / begin if begin > 0 else 0.0


def __getattr__(name: str) -> Any:  # names that upstream's module offers, too
    return upstream_name(__name__, name)

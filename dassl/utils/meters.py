"""Running averages for the progress lines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["AverageMeter", "MetricMeter"]


class AverageMeter:
    """Last value and running mean of one number.

    Args:
        ema: keep an exponential moving average (0.9 old, 0.1 new) instead of the mean.
    """

    def __init__(self, ema: bool = False) -> None:
        self.ema = ema
        self.reset()

    def reset(self) -> None:
        """Forget all values."""
        self.val = 0.0
        self.avg = 0.0
        self.sum = 0.0
        self.count = 0

    def update(self, val: Any, n: int = 1) -> None:
        """Add a value (number or one-element tensor) that is the mean of ``n`` items."""
        value = float(val.detach()) if isinstance(val, torch.Tensor) else float(val)
        first = self.count == 0
        self.val = value
        self.sum += value * n
        self.count += n
        if self.ema:
            self.avg = value if first else 0.9 * self.avg + 0.1 * value
        else:
            self.avg = self.sum / self.count


class MetricMeter:
    """A set of AverageMeters by name; its text is ``name value (mean)`` for each, in the order of first appearance."""

    def __init__(self, delimiter: str = " ") -> None:
        self.meters: defaultdict[str, AverageMeter] = defaultdict(AverageMeter)
        self.delimiter = delimiter

    def update(self, input_dict: Mapping[str, Any] | None) -> None:
        """Add one value to each named meter; None is ignored."""
        if input_dict is None:
            return
        if not isinstance(input_dict, Mapping):
            raise TypeError(f"Expected a dict of numbers but got {type(input_dict).__name__}")
        for name, value in input_dict.items():
            self.meters[name].update(value)

    def __str__(self) -> str:
        return self.delimiter.join(f"{name} {meter.val:.4f} ({meter.avg:.4f})" for name, meter in self.meters.items())

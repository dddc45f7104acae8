"""Bring numbers from the device to the program without making it wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def sent(values: Sequence[Tensor]) -> Callable[[], list[float]]:
    """Send one-element tensors to the program, and return what gives their values.

    On a GPU the copy waits its turn and the program goes on. Sent before the backward pass and asked for after the
    step, they are there: the step has waited for its gradients in between.
    """
    numbers = torch.stack([value.detach().float() for value in values]).to("cpu", non_blocking=True)
    if values[0].device.type != "cuda":
        return numbers.tolist
    there = torch.cuda.Event()
    there.record()

    def read() -> list[float]:
        there.synchronize()
        return numbers.tolist()

    return read

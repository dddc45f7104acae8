"""Bring numbers from the device to the program without making it wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def sent(values: Sequence[Tensor]) -> Callable[[], list[float]]:
    """Send one-element tensors to the CPU, and return a function that gives their values.

    On a GPU, the copy is queued and the program goes on. Send the tensors before the backward pass and ask for their
    values after the step: the copy has then finished, as the step has waited for the gradients in between.
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

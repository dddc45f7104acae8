"""Number formats of a training step, in one place: autocast, loss scaling, backward and step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dassl.utils import InputError

PRECISIONS = ("fp32", "fp16", "amp", "bf16")


class Precision:
    """How a step computes, for one of four names.

    ====  ======================================  ==================
    name  autocast                                gradients scaled
    ====  ======================================  ==================
    fp32  none                                    no
    amp   float16 on CUDA, bfloat16 on the CPU    on CUDA
    fp16  as amp; the trainer also keeps its      on CUDA
          frozen backbone in half precision
    bf16  bfloat16                                no
    ====  ======================================  ==================

    The CPU takes bfloat16 for float16 because many of its kernels have no float16 form. bfloat16 has float32's range,
    so its gradients need no scaling.

    Args:
        prec: one of the names.
        device_type: "cuda" or "cpu".
    """

    def __init__(self, prec: str = "fp32", device_type: str = "cpu") -> None:
        if prec not in PRECISIONS:
            raise InputError(f'Expected PREC to be one of {", ".join(PRECISIONS)} but got "{prec}"')
        self.prec = prec
        self.device_type = device_type
        self.dtype: torch.dtype | None = None
        if prec == "bf16" or (prec in ("amp", "fp16") and device_type != "cuda"):
            self.dtype = torch.bfloat16
        elif prec != "fp32":
            self.dtype = torch.float16
        self.scaler = torch.amp.GradScaler(device_type) if self.dtype is torch.float16 else None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context for the forward pass and the losses."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Back-propagate a scalar loss, scaled where float16 gradients would underflow."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(self, optimizers: Iterable[Optimizer]) -> bool:
        """Step optimisers on the gradients there are; with scaling, a step with overflowed gradients is left out.

        Returns:
            Whether the step was made.
        """
        if self.scaler is None:
            for optimizer in optimizers:
                optimizer.step()
            return True
        scale, stepped = self.scaler.get_scale(), False
        for optimizer in optimizers:
            # The scaler refuses an optimiser without a single gradient (a model that this loss does not involve).
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                self.scaler.step(optimizer)
                stepped = True
        if stepped:
            self.scaler.update()
        return self.scaler.get_scale() >= scale  # an overflow, and nothing else, makes it smaller

    def step(self, loss: Tensor, optimizers: Iterable[Optimizer]) -> bool:
        """``backward`` and ``update``; the gradients must have been zeroed. Returns whether the step was made."""
        self.backward(loss)
        return self.update(optimizers)

    def state_dict(self) -> dict[str, Any]:
        """The loss scale and its counters (plain values); empty without a scaler."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put ``state_dict`` back; ignored where either run has no scaler."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)

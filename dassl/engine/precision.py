"""Number formats of a training step, in one place: autocast, loss scaling, backward and step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dassl.utils import InputError

from .reliability.finite import largest_gradient

PRECISIONS = ("fp32", "fp16", "amp", "bf16")


class Precision:
    """The number formats of a step, chosen by one of four names.

    ====  ======================================  ==================
    name  autocast                                gradients scaled
    ====  ======================================  ==================
    fp32  none                                    no
    amp   float16 on CUDA, bfloat16 on the CPU    on CUDA
    fp16  as amp; the trainer also keeps its      on CUDA
          frozen backbone in half precision
    bf16  bfloat16                                no
    ====  ======================================  ==================

    The CPU uses bfloat16 instead of float16 because many of its kernels have no float16 form. bfloat16 has float32's
    range, so its gradients need no scaling.

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
        """Return a context for the forward pass and the losses."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Back-propagate a scalar loss, scaled where float16 gradients would underflow."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(
        self, optimizers: Iterable[Optimizer], look: Callable[[Tensor | None], tuple[bool, bool]] | None = None
    ) -> bool:
        """Step optimizers on the present gradients; with scaling, leave out a step with overflowed gradients.

        With scaling, the program waits for the device once, to read whether the gradients are finite. The scaler's own
        ``step`` would wait once for each optimizer, and its ``get_scale`` again.

        Args:
            optimizers: all of them step, or none.
            look: used with scaling only; None: only the gradients are checked. It is given the largest gradient, a
                number that is finite just when all are (None: there are no gradients). It returns whether the loss is
                finite (if not, the loss scale stays, too) and whether the gradients are.

        Returns:
            Whether the step was made.
        """
        if self.scaler is None:
            for optimizer in optimizers:
                optimizer.step()
            return True
        # The scaler refuses an optimizer without a single gradient (a model that this loss does not involve).
        involved = [
            o for o in optimizers if any(p.grad is not None for group in o.param_groups for p in group["params"])
        ]
        for optimizer in involved:
            self._unscale(optimizer)
        largest = largest_gradient(involved)
        if look is None:
            sound, made = True, largest is None or math.isfinite(float(largest))
        else:
            sound, made = look(largest)
        if not involved:
            return sound
        if not sound:
            self.scaler.update(self.scaler.get_scale())  # forgets that gradients were unscaled, and keeps the scale
            return False
        if made:
            for optimizer in involved:
                optimizer.step()
        self.scaler.update()
        return made

    def _unscale(self, optimizer: Optimizer) -> None:
        """Divide an optimizer's gradients by the loss scale, unless a method has already done so, to clip them."""
        assert self.scaler is not None
        try:
            self.scaler.unscale_(optimizer)
        except RuntimeError as error:
            if "already been called" not in str(error):
                raise

    def step(self, loss: Tensor, optimizers: Iterable[Optimizer]) -> bool:
        """Back-propagate a loss and step the optimizers; return whether the step was made.

        This is ``backward`` and ``update``. The gradients must have been zeroed before.
        """
        self.backward(loss)
        return self.update(optimizers)

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale and its counters (plain values); empty without a scaler."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put ``state_dict`` back; do nothing where either run has no scaler."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)

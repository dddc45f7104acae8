"""One optimization step: precision, finiteness, the mean over processes, and whether the step was made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dassl.data.sharding import Share
from dassl.engine.reliability.finite import StepGuard
from dassl.utils import distributed

from .models import Names, RegisteredModels
from .parallel import average_gradients
from .precision import Precision


class Steps(RegisteredModels):
    """Back-propagate a loss and step the registered optimizers, unless numbers were lost."""

    def __init__(self) -> None:
        super().__init__()
        self.precision = Precision()
        self.guard = StepGuard()
        self.stepped = False  # whether the latest ``model_update`` changed the model
        self.share: Share | None = None  # how processes share this step's batch; None: each has all of it
        self._weighted = False  # whether the present gradients come from a weighted loss
        self._averaged: set[int] = set()  # optimizers whose gradients are averaged already, by id

    def where(self) -> str:
        """Return the place in the run, for messages."""
        raise NotImplementedError

    def set_precision(self, prec: str) -> None:
        """Set the precision of all later steps to fp32, fp16, amp or bf16; see Precision."""
        self.precision = Precision(prec, torch.device(self.device).type)

    def detect_anomaly(self, loss: Tensor) -> None:
        """Raise a FloatingPointError that names the place when the loss is infinite or NaN."""
        if not torch.isfinite(loss).all():
            raise FloatingPointError(
                f"Expected the loss to be finite but got {loss.detach().flatten().tolist()[:4]} at {self.where()}"
            )

    def model_zero_grad(self, names: Names = None) -> None:
        """Clear the gradients of the named models (all by default)."""
        self._weighted = False
        self._averaged.clear()
        for optimizer in self._optimizers(names):
            optimizer.zero_grad()

    def model_backward(self, loss: Tensor) -> bool:
        """Check the loss and back-propagate it.

        Within a step of the engine's loop, a loss that is not finite raises no error: ``model_update`` then changes
        nothing, and the end of the step deals with the fault (TRAIN.ON_NAN).

        Each of several processes gives the mean over its part of the batch. That loss is weighted by the size of the
        part, so that the mean of the gradients is exactly that of the loss over the whole batch.

        Returns:
            Whether the loss was back-propagated.

        Raises:
            FloatingPointError: the loss is not finite, and no step of the engine's loop runs.
        """
        if not self.guard.active:
            self.detect_anomaly(loss)
        elif not self.guard.admits_loss(loss):
            return False
        if self.share is not None:
            self._weighted = True
            if self.share.weight != 1:
                loss = loss * self.share.weight
        self.precision.backward(loss)
        return True

    def average_gradients(self, names: Names = None) -> None:
        """Average the gradients of the named models (all by default) over the processes.

        ``model_update`` does so itself. Call this earlier only to look at the gradients in between, to clip them, say.
        """
        for optimizer in self._optimizers(names):
            self._average(optimizer)
            self._averaged.add(id(optimizer))

    def _average(self, optimizer: Any) -> None:
        if id(optimizer) in self._averaged or distributed.world_size() == 1:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.share is not None and self.share.weight != 1 and not self._weighted:
            for parameter in parameters:  # the trainer has a backward of its own
                if parameter.grad is not None:
                    parameter.grad.mul_(self.share.weight)
        average_gradients(parameters)

    def model_update(self, names: Names = None) -> bool:
        """Step the optimizers of the named models (all by default) on the mean of the processes' gradients.

        The step is left out where its loss or a gradient is not finite. With a loss scale, gradients may overflow; this
        is no fault, and the scaler adapts the scale. If the step is made, ``after_update`` is called.

        Returns:
            Whether the step was made; ``stepped`` keeps the answer.
        """
        optimizers = self._optimizers(names)
        self.stepped = False
        if not self.guard.fault:
            self.average_gradients(names)
            if not self.guard.active:
                self.stepped = self.precision.update(optimizers)
            elif self.precision.scaler is not None:
                self.stepped = self.precision.update(optimizers, self._look)
            elif self.guard.admits_gradients(optimizers):
                self.stepped = self.precision.update(optimizers)
        self._averaged.clear()
        if self.stepped:
            self.after_update()
        return self.stepped

    def _look(self, gradient: Tensor | None) -> tuple[bool, bool]:
        """Return whether the loss is finite, and whether the gradients are; an overflow is no fault of the step."""
        finite = self.guard.look(gradient)
        return not self.guard.fault, finite

    def model_backward_and_update(self, loss: Tensor, names: Names = None) -> bool:
        """Clear the gradients, back-propagate the loss, check both, and step; return whether the step was made.

        On a GPU the program waits once, before the step, to read whether loss and gradients are finite.
        """
        self.model_zero_grad(names)
        with self.guard.one_look():
            self.model_backward(loss)
            return self.model_update(names)

    def all_reduce_mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over the whole batch of a step, given the mean over this process's part of the batch.

        Use it for what is not a sum over images, such as a running center. The result is a new tensor without gradient.
        All processes must call it alike, as everything that talks to the others.
        """
        return distributed.all_reduce_mean(tensor, 1.0 if self.share is None else self.share.size)

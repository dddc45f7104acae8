"""Keep a loss or gradients that are NaN or infinite from reaching the model.

Each step is checked twice before it may change the model: its loss must be finite, and its gradients must be, before
the optimizer follows them. Where the engine makes the whole step, both answers are read at once, because a GPU has to
finish its work for each look at a number.

If a step may not change the model, the model, its optimizer and the loss scale stay as they are. The step goes on to
its end (so that it can tell all its loss terms), and the hook ``Losses`` stops the run or leaves the step out. What the
forward pass has changed by then, such as the running means of a BatchNorm, is put back (``KeptBuffers``). Whatever else
follows the model from step to step moves in ``after_update``, which is not called for a step that is left out.

Several processes all answer alike, so that none waits for another that has left a step out.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dassl.utils import InputError, atomic_write, distributed, one_line
from dassl.utils.checkpoints import pointed_file

if TYPE_CHECKING:
    from dassl.engine.trainer import SimpleTrainer

__all__ = [
    "RECORD",
    "KeptBuffers",
    "NotFiniteError",
    "StepGuard",
    "largest_gradient",
    "last_checkpoint",
    "lost_terms",
    "report",
]

RECORD = "not_finite.json"  # in the run's folder: the step that stopped the run, with the paths of all its images
SHOWN = 8  # image paths in the message, at most


class NotFiniteError(FloatingPointError):
    """A run stopped because numbers were lost; ``str`` of it is several lines for the screen."""


def largest_gradient(optimizers: Iterable[Optimizer]) -> Tensor | None:
    """Return the largest absolute value of all gradients of optimizers, [], on their device; None: there are none.

    It is finite just when all of them are: NaN among them makes it NaN.
    """
    grads = [
        p.grad
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None and p.grad.numel()
    ]
    if not grads:
        return None
    if all(grad.device.type == "cpu" for grad in grads):  # there the norm below takes ten times as long
        largest = [end for grad in grads for end in torch.aminmax(grad)]
    else:
        largest = list(torch._foreach_norm(grads, math.inf))  # a few kernels for all of them
    return torch.stack(_alike(largest)).abs().amax()


def _alike(numbers: list[Tensor]) -> list[Tensor]:
    """Return numbers on one device and in one dtype, so that they can be stacked; without a copy where they are so."""
    if len({(number.dtype, number.device) for number in numbers}) == 1:
        return numbers
    return [number.to(numbers[-1].device, torch.float64) for number in numbers]


class StepGuard:
    """Decide whether the running step may change the model.

    Attributes:
        active: whether a step of the engine's loop runs, which deals with faults at its end; if not, they are raised at
            once.
        fault: what was not finite in this step; "": nothing.
        checked: whether a loss of this step was checked. If none was, the method has a backward of its own.
    """

    def __init__(self) -> None:
        self.active = False
        self.fault = ""
        self.checked = False
        self._later = False  # whether losses wait for the look at the gradients
        self._waiting: list[Tensor] = []  # those losses, []

    def begin(self) -> None:
        """Begin a step, without any fault."""
        self.active, self.fault, self.checked = True, "", False
        self._waiting.clear()

    def end(self) -> None:
        """End the present step, which may be one that died and left this guard active."""
        self.active, self.fault = False, ""

    @contextlib.contextmanager
    def one_look(self) -> Iterator[None]:
        """Check losses together with their gradients, in one look, while this context lasts.

        A loss is back-propagated unchecked; the look comes before any optimizer steps. With several processes, each
        loss is still checked by itself, because either all of them average their gradients, or none.
        """
        self._later = distributed.world_size() == 1
        try:
            yield
        finally:
            self._later = False
            if self._waiting:  # nothing has asked for a look at the gradients
                self.look(None)

    def look(self, gradient: Tensor | None) -> bool:
        """Read whether the losses that wait, and the gradients, are finite.

        A loss that is not finite becomes the ``fault``.

        Args:
            gradient: the answer of ``largest_gradient``; None: there is none to read.

        Returns:
            Whether the gradients are finite; True if there is nothing to read.
        """
        numbers = [*self._waiting, *([] if gradient is None else [gradient])]
        count = len(self._waiting)
        self._waiting.clear()
        if not numbers:
            return True
        values = torch.stack(_alike(numbers)).tolist()  # one transfer
        if not all(map(math.isfinite, values[:count])):
            self.fault = self.fault or "the loss"
        return all(map(math.isfinite, values[count:]))

    def admits_loss(self, loss: Tensor) -> bool:
        """Return whether a loss may be back-propagated."""
        self.checked = True
        loss = loss.detach()
        if loss.ndim:
            loss = loss.abs().amax()
        if self._later:
            self._waiting.append(loss)
            return True
        if distributed.any_rank(not math.isfinite(float(loss))):
            self.fault = self.fault or "the loss"
        return not self.fault

    def admits_gradients(self, optimizers: Iterable[Optimizer]) -> bool:
        """Return whether optimizers may follow their gradients, which are the same in all processes."""
        if self.fault:
            return False
        if not self.look(largest_gradient(optimizers)):
            self.fault = self.fault or "a gradient"
        return not self.fault


class KeptBuffers:
    """The buffers of models as they were before a step: a forward pass changes some before its loss is known.

    Buffers that are not saved in checkpoints are left out: other values determine them.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []  # module, name, the buffer, a copy

    @torch.no_grad()
    def keep(self, models: Iterable[nn.Module | None]) -> None:
        """Copy the present values of all models' buffers."""
        # All are copied, changed or not: torch's kernels may write without raising a tensor's version.
        self._kept = [
            (module, name, buffer, buffer.detach().clone())
            for model in models
            if model is not None
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the buffers the values that they had when ``keep`` was called last."""
        for module, name, buffer, copy in self._kept:
            module._buffers[name] = buffer.copy_(copy)


def lost_terms(trainer: SimpleTrainer, summary: Mapping[str, float]) -> list[str]:
    """Return the names of the losses that are not finite in what forward_backward returned.

    A loss has "loss" in its name, or its name is in ``loss_terms``.
    """
    return [
        name
        for name, value in summary.items()
        if not math.isfinite(value) and ("loss" in name.lower() or name in trainer.loss_terms)
    ]


def last_checkpoint(trainer: SimpleTrainer) -> Path | None:
    """Return the checkpoint that the same command would resume from; None: there is none."""
    names = trainer.get_model_names()
    for folder in (trainer.output_dir, trainer.cfg.RESUME) if names else ():
        with contextlib.suppress(InputError):
            return pointed_file(Path(folder) / names[0])
    return None


def report(trainer: SimpleTrainer, what: str, remark: str, summary: Mapping[str, float], advice: str) -> NotFiniteError:
    """Return the error that ends a run at this step, and write ``not_finite.json``, which has all details.

    The file is written while epochs run, by rank 0. All processes must call this function alike.

    Args:
        trainer: the trainer, at that step.
        what: what is not finite.
        remark: what became of the step.
        summary: the loss terms.
        advice: what may help.
    """
    own = [path for batch in trainer.stats.batches for path in _paths(batch)]
    images = list(dict.fromkeys(path for paths in distributed.gather_objects(own) for path in paths))
    checkpoint = last_checkpoint(trainer)
    if trainer.writes_files and trainer.phase == "train":
        # If the file cannot be written, the message below is still given.
        with contextlib.suppress(OSError), atomic_write(Path(trainer.output_dir) / RECORD) as stream:
            content = {
                "step": trainer.global_step + 1,
                "where": trainer.where(),
                "what": what,
                "terms": {name: repr(value) for name, value in summary.items()},  # JSON has no NaN
                "lr": trainer.get_current_lr(),
                "images": images,
                "checkpoint": None if checkpoint is None else str(checkpoint),
            }
            json.dump(content, stream, indent=2)
    more = f", and {len(images) - SHOWN} more: {RECORD}" if len(images) > SHOWN else ""
    lines = [
        f"Expected {what} to be finite but it is not, at step {trainer.global_step + 1}, {trainer.where()}: {remark}",
        f"loss terms: {', '.join(f'{name} {value:g}' for name, value in summary.items())}",
        f"images: {', '.join(one_line(path) for path in images[:SHOWN]) or 'not known'}{more}",
        f"last good checkpoint: {'none yet' if checkpoint is None else one_line(str(checkpoint))}",
        advice,
    ]
    return NotFiniteError("\n  ".join(lines))


def _paths(batch: Any) -> list[str]:
    paths = batch.get("impath", ()) if isinstance(batch, Mapping) else ()
    return [str(path) for path in ([paths] if isinstance(paths, str) else paths)]

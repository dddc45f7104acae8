"""Running means of what forward_backward returns, and what is done where numbers are lost."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dassl.engine.reliability.finite import lost_terms, report

from .base import HookBase

if TYPE_CHECKING:
    from dassl.engine.trainer import SimpleTrainer

logger = logging.getLogger(__name__)

WHAT_HELPS = (
    "what may help: a lower OPTIM.LR, PREC fp32 (or bf16) instead of fp16, or TRAIN.ON_NAN skip to leave such steps out"
)


def as_numbers(summary: Mapping[str, Any] | None) -> dict[str, float]:
    """Convert what forward_backward returned, such as one-element tensors, into plain numbers.

    All tensors of one device are read in one transfer, because a program waits for the GPU at each transfer.
    """
    found = dict(summary or {})
    tensors = {name: value.detach() for name, value in found.items() if isinstance(value, Tensor)}
    if len(tensors) > 1 and len({value.device for value in tensors.values()}) == 1:
        values = torch.stack([value.reshape(()).double() for value in tensors.values()]).tolist()
        found |= zip(tensors, values, strict=True)
    return {name: float(value.detach() if isinstance(value, Tensor) else value) for name, value in found.items()}


def fault_of(trainer: SimpleTrainer, summary: Mapping[str, float]) -> str:
    """Return what was not finite in the step that a trainer has just made; "": nothing."""
    lost = lost_terms(trainer, summary)
    if trainer.guard.fault == "the loss" or not lost:
        return trainer.guard.fault
    return ", ".join(lost)


class Losses(HookBase):
    """Keep ``trainer.stats.losses`` and the means of the last epoch; deal with steps that are not finite.

    Attributes:
        skipped: how many steps were not finite and did not end the run (TRAIN.ON_NAN skip).
    """

    def __init__(self) -> None:
        self.means: dict[str, float] = {}
        self.skipped = 0

    def after_step(self, trainer: SimpleTrainer) -> None:
        fault = fault_of(trainer, trainer.stats.summary)
        if fault:
            self._lost(trainer, fault)
            return
        trainer.stats.losses.update(trainer.stats.summary)
        self.means = {name: meter.avg for name, meter in trainer.stats.losses.meters.items()}

    def _lost(self, trainer: SimpleTrainer, fault: str) -> None:
        """Stop the run, or count the step as skipped; its numbers enter no mean.

        Raises:
            NotFiniteError: the run is to stop, or the method steps its optimizer itself and it is too late to skip.
        """
        node, summary = trainer.cfg.TRAIN, trainer.stats.summary
        if not trainer.guard.checked:
            remark = "the trainer steps by itself, its model may be spoilt"
            raise report(trainer, fault, remark, summary, "what may help: a lower OPTIM.LR")
        remark = "the step changed nothing" if trainer.guard.fault else "the loss itself is, the step was made"
        if node.ON_NAN == "stop":
            raise report(trainer, fault, remark, summary, WHAT_HELPS)
        if self.skipped >= node.ON_NAN_LIMIT:
            remark += f"; {self.skipped} such steps were skipped before (TRAIN.ON_NAN_LIMIT)"
            raise report(trainer, fault, remark, summary, WHAT_HELPS.partition(", or TRAIN")[0])
        self.skipped += 1
        did = "left out" if trainer.guard.fault else "made, because the loss itself is finite"
        count = f"{self.skipped} of at most {node.ON_NAN_LIMIT}"
        logger.warning("%s: %s is not finite; step %s (%s)", trainer.where(), fault, did, count)

    def state_dict(self, trainer: SimpleTrainer) -> dict[str, Any]:
        return {"means": self.means, "skipped": self.skipped}

    def load_state_dict(self, trainer: SimpleTrainer, state: dict[str, Any]) -> None:
        self.means = dict(state["means"])
        self.skipped = state.get("skipped", 0)  # older checkpoints lack it

"""The progress bar of training, on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dassl.evaluation.passes import progress_bar

from .base import HookBase

if TYPE_CHECKING:
    from dassl.engine.trainer import SimpleTrainer

SHOWN = ("loss", "acc")


class ProgressBar(HookBase):
    """Show one bar over all epochs, which counts batches and has the epoch's mean loss and accuracy so far."""

    def __init__(self) -> None:
        self._bar: Any = None

    def after_step(self, trainer: SimpleTrainer) -> None:
        # Made at the first step: only then is the number of batches known for sure.
        if self._bar is None:
            self._bar = progress_bar(
                desc="train",
                unit="batch",
                total=trainer.max_epoch * trainer.num_batches,
                initial=trainer.start_epoch * trainer.num_batches,
            )
        meters = trainer.stats.losses.meters
        means = " ".join(f"{name} {meters[name].avg:.4g}" for name in SHOWN if name in meters)
        self._bar.set_postfix_str(f"epoch {trainer.epoch + 1}/{trainer.max_epoch} {means}".rstrip(), refresh=False)
        self._bar.update()

    def after_epoch(self, trainer: SimpleTrainer) -> None:
        if self._bar is not None:
            self._bar.clear()  # an evaluation's bar and lines may follow; the next step draws it again

    def after_train(self, trainer: SimpleTrainer) -> None:
        self.close(trainer)

    def close(self, trainer: SimpleTrainer) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

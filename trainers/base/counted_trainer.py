"""Count training in steps per shot, in one stage or several, instead of in epochs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from .encoder_trainer import EncoderTrainer

logger = logging.getLogger(__name__)


class CountedTrainer(EncoderTrainer):
    """An EncoderTrainer whose setting `n_iters` says how many steps are made for each shot.

    The number of epochs follows from that of steps. Each stage begins with an epoch; batches of its last epoch that are
    beyond its number of steps are passed over. Where `n_iters` is 0, or all images are used, OPTIM.MAX_EPOCH counts.

    Attributes:
        stages: number of steps of each stage, settled by `count_stages`.
    """

    per_step = True
    drop_last = False
    stages: tuple[int, ...] = ()

    def split(self, count: int) -> tuple[int, ...]:
        """Return the shares of the stages in a number of steps, or of epochs; here there is one stage."""
        return (count,)

    def count_stages(self) -> None:
        """Count the steps of each stage and, with them, the epochs."""
        settings = self.settings
        self._per_epoch, shots = max(1, len(self.train_loader_x)), self.cfg.DATASET.NUM_SHOTS
        self._summary: dict[str, float] = {}
        if settings.n_iters and shots > 0:
            self.stages = self.split(settings.n_iters * shots)
            self.max_epoch = sum(self._epochs())
            logger.info("Steps: %s in %d epochs", " + ".join(map(str, self.stages)), self.max_epoch)
            return
        self.stages = tuple(epochs * self._per_epoch for epochs in self.split(self.cfg.OPTIM.MAX_EPOCH))
        if settings.n_iters:
            logger.info("All images are used, no number of shots: OPTIM.MAX_EPOCH counts, %d", self.max_epoch)

    @property
    def total_steps(self) -> int:
        """Number of steps of all stages."""
        return sum(self.stages)

    def _epochs(self) -> list[int]:
        return [math.ceil(steps / self._per_epoch) for steps in self.stages]

    def place(self) -> tuple[int, int]:
        """Return the stage (from 0) of the present epoch, and the present batch's step within the stage.

        That step is at least the stage's number of steps where the batch is to be passed over.
        """
        first = 0
        for stage, epochs in enumerate(self._epochs()):
            if self.epoch < first + epochs or stage + 1 == len(self.stages):
                return stage, (self.epoch - first) * self._per_epoch + self.batch_idx
            first += epochs
        raise AssertionError("count_stages has not been called")

    def before_step(self, step: int) -> None:
        """Prepare a step; `step` counts from 0 over all stages."""

    def forward_backward(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Make one step, but none for the batches of a stage's last epoch that are beyond its number of steps.

        Returns:
            What to show of the step; for a batch without a step, that of the last step that changed the model.
        """
        stage, step = self.place()
        if step < self.stages[stage]:
            self.before_step(sum(self.stages[:stage]) + step)
            summary = super().forward_backward(batch)
            if not self.stepped:
                return summary
            self._summary = summary
        return self._summary

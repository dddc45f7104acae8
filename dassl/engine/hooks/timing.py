"""Clocks and the learning rate."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from dassl.evaluation.passes import Evaluation
from dassl.utils.logger import DETAIL

from .base import HookBase

if TYPE_CHECKING:
    from dassl.engine.trainer import SimpleTrainer

logger = logging.getLogger(__name__)

MUCH_WAITING = 10.0  # seconds of waiting for data that a user should hear of, if they are most of the time


class Timing(HookBase):
    """Measure each step and the wait for its batch, in seconds; sums are over the run, with all resumed parts."""

    def __init__(self) -> None:
        self.train_seconds = 0.0
        self.data_seconds = 0.0  # of these, spent on waiting for batches
        self.images = 0
        self.test_seconds: dict[str, float] = {}  # by split
        self._mark = time.perf_counter()

    def before_epoch(self, trainer: SimpleTrainer) -> None:
        self._mark = time.perf_counter()

    def before_step(self, trainer: SimpleTrainer) -> None:
        waited = time.perf_counter() - self._mark
        trainer.stats.data_time.update(waited)
        self.data_seconds += waited

    def after_step(self, trainer: SimpleTrainer) -> None:
        now = time.perf_counter()
        trainer.stats.batch_time.update(now - self._mark)
        self.train_seconds += now - self._mark
        self.images += trainer.stats.images
        self._mark = now

    def after_epoch(self, trainer: SimpleTrainer) -> None:
        data, whole = trainer.stats.data_time.sum, trainer.stats.batch_time.sum
        if whole > 0:
            trainer.write_scalar("train/data_share", data / whole, trainer.global_step)

    def after_train(self, trainer: SimpleTrainer) -> None:
        if self.train_seconds > 0:
            share = 100 * self.data_share
            shown = None if self.data_seconds > MUCH_WAITING and share > 50 else DETAIL
            logger.info(
                "Waiting for data: %.1f s of %.1f s (%.0f%%)", self.data_seconds, self.train_seconds, share, extra=shown
            )

    @property
    def data_share(self) -> float:
        """Share of the training time in which there was no batch to train on, in [0, 1]."""
        return self.data_seconds / self.train_seconds if self.train_seconds > 0 else 0.0

    def after_test(self, trainer: SimpleTrainer, evaluation: Evaluation) -> None:
        self.test_seconds[evaluation.split] = self.test_seconds.get(evaluation.split, 0.0) + evaluation.seconds

    def summary(self) -> dict[str, float]:
        """Return train_seconds, images_per_second of training, data_seconds (waiting), data_share, <split>_seconds."""
        speed = self.images / self.train_seconds if self.train_seconds > 0 else 0.0
        splits = {f"{split}_seconds": seconds for split, seconds in self.test_seconds.items()}
        return {
            "train_seconds": self.train_seconds,
            "images_per_second": speed,
            "data_seconds": self.data_seconds,
            "data_share": self.data_share,
            **splits,
        }

    def state_dict(self, trainer: SimpleTrainer) -> dict[str, Any]:
        return {
            "train_seconds": self.train_seconds,
            "data_seconds": self.data_seconds,
            "images": self.images,
            "test_seconds": self.test_seconds,
        }

    def load_state_dict(self, trainer: SimpleTrainer, state: dict[str, Any]) -> None:
        self.train_seconds = state["train_seconds"]
        self.data_seconds = state.get("data_seconds", 0.0)  # older checkpoints lack it
        self.images = state["images"]
        self.test_seconds = dict(state["test_seconds"])


class LearningRate(HookBase):
    """Keep the learning rate that a step uses.

    The rate is read before the step, because trainers move the schedule on within their last step.
    """

    def before_step(self, trainer: SimpleTrainer) -> None:
        trainer.stats.lr = trainer.get_current_lr()

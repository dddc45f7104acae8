"""Checkpoints: resuming, the best model on validation, numbered files."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from dassl.utils import InputError, load_checkpoint
from dassl.utils.torchtools import BEST_NAME, POINTER_NAME

from .base import HookBase

logger = logging.getLogger(__name__)


class BestModel(HookBase):
    """With TEST.FINAL_MODEL best_val: validate after each epoch and save on strict improvement."""

    def __init__(self) -> None:
        self.choice: dict[str, dict[str, Any]] = {}  # the epoch chosen, in the form of ``trainer.selected``

    def after_epoch(self, trainer: Any) -> None:
        test = trainer.cfg.TEST
        if test.NO_TEST or test.FINAL_MODEL != "best_val":
            return
        result = trainer.test(split="val")
        if result > trainer.best_result:
            trainer.best_result = result
            count = trainer.evaluation.n if trainer.evaluation is not None else None
            self.choice = {"epoch": {"value": trainer.epoch + 1, "on": "val", "n": count}}
            trainer.save_model(trainer.epoch, trainer.output_dir, val_result=result, model_name=BEST_NAME)

    def state_dict(self, trainer: Any) -> dict[str, Any]:
        return {"best_result": trainer.best_result, "choice": self.choice}

    def load_state_dict(self, trainer: Any, state: dict[str, Any]) -> None:
        trainer.best_result = state["best_result"]
        self.choice = dict(state["choice"])


class Checkpoint(HookBase):
    """Resume before training; save when CHECKPOINT_FREQ divides the epoch's number, and at the last epoch."""

    def before_train(self, trainer: Any) -> None:
        resume = trainer.cfg.RESUME
        names = trainer.get_model_names()
        if resume and names and not any((Path(resume) / name / POINTER_NAME).is_file() for name in names):
            raise InputError(
                f'Expected RESUME to be a folder with "{names[0]}/{POINTER_NAME}" in it '
                f'but got "{resume}", which has none'
            )
        directory = resume or trainer.cfg.OUTPUT_DIR
        trainer.start_epoch = trainer.resume_model_if_exist(directory)
        if trainer.start_epoch and trainer.best_result == -math.inf:
            trainer.best_result = self._best_of(Path(directory), names)

    @staticmethod
    def _best_of(directory: Path, names: list[str]) -> float:
        """The best result of a run whose checkpoints do not tell it (upstream's): the best file does."""
        path = directory / names[0] / BEST_NAME if names else directory
        if not path.is_file():
            return -math.inf
        value = load_checkpoint(path).get("val_result")
        return -math.inf if value is None else float(value)

    def after_epoch(self, trainer: Any) -> None:
        done, every = trainer.epoch + 1, trainer.cfg.TRAIN.CHECKPOINT_FREQ
        if done == trainer.max_epoch or (every > 0 and done % every == 0):
            trainer.save_model(trainer.epoch, trainer.output_dir)

"""Checkpoints: resuming, the best model on validation, numbered files, and those of a run that is told to stop."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dassl.engine.checkpointing.resume import Position, named_newest, rotate, step_name
from dassl.utils import InputError, distributed, load_checkpoint, stopping
from dassl.utils.checkpoints import BEST_NAME, POINTER_NAME

from .base import HookBase

if TYPE_CHECKING:
    from dassl.engine.trainer import SimpleTrainer

logger = logging.getLogger(__name__)

MOST_SAVING = 0.1  # largest share of the time that saving after short epochs may take


class BestModel(HookBase):
    """With TEST.FINAL_MODEL best_val: validate after each epoch and save on strict improvement."""

    def __init__(self) -> None:
        self.choice: dict[str, dict[str, Any]] = {}  # the chosen epoch, in the form of ``trainer.selected``

    def after_epoch(self, trainer: SimpleTrainer) -> None:
        test = trainer.cfg.TEST
        if test.NO_TEST or test.FINAL_MODEL != "best_val":
            return
        result = trainer.test(split="val")
        if result > trainer.best_result:
            trainer.best_result = result
            count = trainer.evaluation.n if trainer.evaluation is not None else None
            self.choice = {"epoch": {"value": trainer.epoch + 1, "on": "val", "n": count}}
            trainer.save_model(trainer.epoch, trainer.output_dir, val_result=result, model_name=BEST_NAME)

    def state_dict(self, trainer: SimpleTrainer) -> dict[str, Any]:
        return {"best_result": trainer.best_result, "choice": self.choice}

    def load_state_dict(self, trainer: SimpleTrainer, state: dict[str, Any]) -> None:
        trainer.best_result = state["best_result"]
        self.choice = dict(state["choice"])


class Checkpoint(HookBase):
    """Resume before training; save checkpoints to numbered files, and to step files.

    Numbered files stay; of step files, only the newest stay.

    Several processes all decide alike: if one of them is told to stop, all stop, and rank 0's clock counts for all.
    """

    def __init__(self) -> None:
        self._began = self._saved = time.monotonic()
        self._saving = 0.0  # seconds spent on saving
        self._due = False  # whether a step's checkpoint fell due at the last step of an epoch

    # ---- resuming

    def before_train(self, trainer: SimpleTrainer) -> None:
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
        self._began = self._saved = time.monotonic()

    @staticmethod
    def _best_of(directory: Path, names: list[str]) -> float:
        """Return the best result, from the best file, of a run whose checkpoints do not tell it (upstream's)."""
        path = directory / names[0] / BEST_NAME if names else directory
        if not path.is_file():
            return -math.inf
        value = load_checkpoint(path).get("val_result")
        return -math.inf if value is None else float(value)

    # ---- saving

    def between_steps(self, trainer: SimpleTrainer) -> None:
        train = trainer.cfg.TRAIN
        due = train.CHECKPOINT_STEPS > 0 and (trainer.global_step + 1) % train.CHECKPOINT_STEPS == 0
        number, late = distributed.largest(stopping.noted(), distributed.is_main() and self._late(train))
        if number:
            self._save_step(trainer, Position(trainer.epoch, trainer.steps_done))
            stopping.forget()
            raise stopping.StoppedError(number, kept=True)
        if due or late:
            if trainer.steps_done < trainer.num_batches:
                self._save_step(trainer, Position(trainer.epoch, trainer.steps_done))
            else:
                self._due = True  # a checkpoint at the end of the epoch is as good, and repeats no work

    def after_epoch(self, trainer: SimpleTrainer) -> None:
        train = trainer.cfg.TRAIN
        done, every = trainer.epoch + 1, train.CHECKPOINT_FREQ
        if done == trainer.max_epoch or (every > 0 and done % every == 0):
            self._save(trainer, trainer.epoch, f"model.pth.tar-{done}")
            return
        cheap = self._saving <= MOST_SAVING * (time.monotonic() - self._began)
        (wanted,) = distributed.largest(distributed.is_main() and (cheap or self._due or self._late(train)))
        if wanted:
            self._save_step(trainer, Position(done, 0))

    def after_train(self, trainer: SimpleTrainer) -> None:
        """Save the last epoch's checkpoint if the run died before this checkpoint was named newest.

        Such a run is resumed from the best checkpoint, with no epoch left. The pointer is checked, not only the file: a
        run may die after it has written the file and before it has written the pointer to it.
        """
        if not trainer.has_training_step() or trainer.start_epoch < trainer.max_epoch or trainer.cfg.RESUME:
            return
        name = f"model.pth.tar-{trainer.max_epoch}"
        folders = [Path(trainer.output_dir) / model for model in trainer.get_model_names()]
        missing = trainer.max_epoch > 0 and any(named_newest(folder) != name for folder in folders)
        # Rank 0's answer counts: a rank that looked later would find what rank 0 has written by then.
        (wanted,) = distributed.largest(distributed.is_main() and missing)
        if wanted:
            self._save(trainer, trainer.max_epoch - 1, name)

    def _late(self, train: Any) -> bool:
        return train.CHECKPOINT_MINUTES > 0 and time.monotonic() - self._saved >= 60 * train.CHECKPOINT_MINUTES

    def _save_step(self, trainer: SimpleTrainer, place: Position) -> None:
        self._save(trainer, place.epochs - 1, step_name(place))

    def _save(self, trainer: SimpleTrainer, epoch: int, name: str) -> None:
        begin = time.monotonic()
        trainer.save_model(epoch, trainer.output_dir, model_name=name)
        if trainer.writes_files:
            for model in trainer.get_model_names():
                rotate(Path(trainer.output_dir) / model, name, trainer.cfg.TRAIN.CHECKPOINTS_KEPT)
        self._saved, self._due = time.monotonic(), False
        self._saving += self._saved - begin

"""The file that figures are drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dassl.evaluation.passes import Evaluation
from dassl.evaluation.predictions import EVAL_PREDICTIONS, PREDICTIONS, save_predictions

from .base import HookBase
from .results import Results

if TYPE_CHECKING:
    from dassl.engine.trainer import SimpleTrainer


class Predictions(HookBase):
    """Write predictions.safetensors after the last test; see dassl/evaluation/predictions.py.

    When only evaluating, into a folder that holds a training run, write predictions-eval.safetensors instead.
    """

    def __init__(self, results: Results) -> None:
        self._results = results

    def _path(self, trainer: SimpleTrainer) -> Path:
        return Path(trainer.output_dir) / (EVAL_PREDICTIONS if self._results.aside else PREDICTIONS)

    def start(self, trainer: SimpleTrainer) -> None:
        if trainer.writes_files:
            self._path(trainer).unlink(missing_ok=True)  # an earlier run's file would not match the metrics to come

    def after_test(self, trainer: SimpleTrainer, evaluation: Evaluation) -> None:
        if evaluation.predictions is not None and trainer.writes_files:
            save_predictions(self._path(trainer), evaluation.predictions)

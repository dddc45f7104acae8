"""The files that figures are drawn from, and those that say which images are classified wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dassl.evaluation.mistakes import EVAL_MISTAKES, MISTAKES, write_mistakes
from dassl.evaluation.passes import Evaluation
from dassl.evaluation.predictions import EVAL_PREDICTIONS, PREDICTIONS, save_predictions
from dassl.utils import atomic_write

from .base import HookBase
from .results import Results

if TYPE_CHECKING:
    from dassl.engine.trainer import SimpleTrainer


class Predictions(HookBase):
    """Write predictions.safetensors after the last test, and from it mistakes.csv and mistakes.png.

    When only evaluating, into a folder that holds a training run, write predictions-eval.safetensors,
    mistakes-eval.csv and mistakes-eval.png instead. See dassl/evaluation/predictions.py and mistakes.py.
    """

    def __init__(self, results: Results) -> None:
        self._results = results

    def _paths(self, trainer: SimpleTrainer) -> tuple[Path, Path]:
        """Return the paths of the predictions and of the list of mistakes; their sheet is a PNG beside the list."""
        names = (EVAL_PREDICTIONS, EVAL_MISTAKES) if self._results.aside else (PREDICTIONS, MISTAKES)
        return Path(trainer.output_dir) / names[0], Path(trainer.output_dir) / names[1]

    def start(self, trainer: SimpleTrainer) -> None:
        if trainer.writes_files:
            predictions, table = self._paths(trainer)
            for path in (predictions, table, table.with_suffix(".png")):
                path.unlink(missing_ok=True)  # an earlier run's file would not match the metrics to come

    def after_test(self, trainer: SimpleTrainer, evaluation: Evaluation) -> None:
        if evaluation.predictions is None or not trainer.writes_files:
            return
        predictions, table = self._paths(trainer)
        save_predictions(predictions, evaluation.predictions)
        write_mistakes(table, evaluation.mistakes)
        if evaluation.mistakes_picture is not None:
            with atomic_write(table.with_suffix(".png"), "wb") as stream:
                stream.write(evaluation.mistakes_picture.png)

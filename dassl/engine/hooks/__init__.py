"""Hook into the training loop what cuts across methods."""

from __future__ import annotations

from typing import Any

from .base import HookBase
from .checkpoint import BestModel, Checkpoint
from .console import ConsoleLine
from .evaluation import FinalTest
from .losses import Losses
from .predictions import Predictions
from .progress import ProgressBar
from .results import Results
from .tensorboard import TensorBoard
from .timing import LearningRate, Timing

__all__ = [
    "BestModel",
    "Checkpoint",
    "ConsoleLine",
    "FinalTest",
    "HookBase",
    "LearningRate",
    "Losses",
    "Predictions",
    "ProgressBar",
    "Results",
    "TensorBoard",
    "Timing",
    "build_hooks",
]


def build_hooks(cfg: Any) -> list[HookBase]:
    """Build the hooks of a run, in the order in which each event reaches them.

    Why this order:

    * Results first: at the start it removes an old completion marker and records config and environment, so that a run
      that dies at any later point has its records and no marker.
    * Timing next, so that no other hook's work is counted into a step; LearningRate reads the rate before the step.
    * Losses before all that show them; it stops the run on a loss that is not finite, before anything is saved.
    * ProgressBar before whatever writes lines after an epoch or a run, because it takes its bar out of their way.
    * BestModel before Checkpoint: the file written last is the one resumed from, and it must know the new best result.
    * Checkpoint before TensorBoard: resuming decides at which step the event file goes on.
    * FinalTest before TensorBoard: the hyper-parameter tab shows the test result.
    * Predictions after Results, which knows whether an evaluation goes beside a training run's files.
    """
    timing, losses, best = Timing(), Losses(), BestModel()
    results = Results(timing, losses, best)
    return [
        results,
        Predictions(results),
        timing,
        LearningRate(),
        losses,
        ProgressBar(),
        ConsoleLine(cfg.TRAIN.PRINT_FREQ),
        best,
        Checkpoint(),
        FinalTest(),
        TensorBoard(),
    ]

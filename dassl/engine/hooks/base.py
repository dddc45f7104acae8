"""The events of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dassl.evaluation.passes import Evaluation

if TYPE_CHECKING:
    from dassl.engine.trainer import SimpleTrainer


class HookBase:
    """Behavior attached to a run; every method may be left out. ``trainer`` is the SimpleTrainer.

    ``start``, ``before_epoch``, ``finish`` and ``close`` come from the loop itself; ``before_train``, ``after_epoch``
    and ``after_train`` from the trainer's methods of that name, which a method may replace; ``before_step``,
    ``after_step`` and ``between_steps`` from ``run_epoch``; ``after_test`` from ``test``.
    """

    def start(self, trainer: SimpleTrainer) -> None:
        """Prepare for a run; called first of all, also when only evaluating."""

    def before_train(self, trainer: SimpleTrainer) -> None:
        """Prepare for training; called before the first epoch."""

    def before_epoch(self, trainer: SimpleTrainer) -> None:
        """Prepare for an epoch; called before each epoch."""

    def before_step(self, trainer: SimpleTrainer) -> None:
        """Prepare for a step; called when its batch is there, and before the step is made."""

    def after_step(self, trainer: SimpleTrainer) -> None:
        """Record a step; called when the step is made."""

    def between_steps(self, trainer: SimpleTrainer) -> None:
        """Save what the run has come to; called when all hooks have heard of the step."""

    def after_epoch(self, trainer: SimpleTrainer) -> None:
        """Finish an epoch; called after each epoch."""

    def after_test(self, trainer: SimpleTrainer, evaluation: Evaluation) -> None:
        """Use the results of a pass over a split; called after each pass."""

    def after_train(self, trainer: SimpleTrainer) -> None:
        """Finish training; called after the last epoch."""

    def finish(self, trainer: SimpleTrainer) -> None:
        """Finish the run; called last, when all went well, also when only evaluating."""

    def close(self, trainer: SimpleTrainer) -> None:
        """Release what is held; called at the end of training, also after an error."""

    def state_dict(self, trainer: SimpleTrainer) -> dict[str, Any]:
        """Return what a resumed run must know: plain values, saved in every checkpoint."""
        return {}

    def load_state_dict(self, trainer: SimpleTrainer, state: dict[str, Any]) -> None:
        """Put ``state_dict`` back."""

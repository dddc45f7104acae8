"""The events of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dassl.evaluation.passes import Evaluation

if TYPE_CHECKING:
    from dassl.engine.trainer import SimpleTrainer


class HookBase:
    """Behaviour attached to a run; every method may be left out. ``trainer`` is the SimpleTrainer.

    ``start``, ``before_epoch``, ``finish`` and ``close`` come from the loop itself; ``before_train``, ``after_epoch``
    and ``after_train`` from the trainer's methods of that name, which a method may replace; ``before_step``,
    ``after_step`` and ``between_steps`` from ``run_epoch``; ``after_test`` from ``test``.
    """

    def start(self, trainer: SimpleTrainer) -> None:
        """First of all; also when only evaluating."""

    def before_train(self, trainer: SimpleTrainer) -> None:
        """Before the first epoch."""

    def before_epoch(self, trainer: SimpleTrainer) -> None:
        """Before each epoch."""

    def before_step(self, trainer: SimpleTrainer) -> None:
        """The batch is there, the step is not yet made."""

    def after_step(self, trainer: SimpleTrainer) -> None:
        """The step is made."""

    def between_steps(self, trainer: SimpleTrainer) -> None:
        """All hooks have heard of the step: what the run has come to can be saved."""

    def after_epoch(self, trainer: SimpleTrainer) -> None:
        """After each epoch."""

    def after_test(self, trainer: SimpleTrainer, evaluation: Evaluation) -> None:
        """After each pass over a split."""

    def after_train(self, trainer: SimpleTrainer) -> None:
        """After the last epoch."""

    def finish(self, trainer: SimpleTrainer) -> None:
        """Last, when all went well; also when only evaluating."""

    def close(self, trainer: SimpleTrainer) -> None:
        """At the end of training, also after an error."""

    def state_dict(self, trainer: SimpleTrainer) -> dict[str, Any]:
        """What a resumed run must know: plain values, saved in every checkpoint."""
        return {}

    def load_state_dict(self, trainer: SimpleTrainer, state: dict[str, Any]) -> None:
        """Put ``state_dict`` back."""

"""The events of a run."""

from __future__ import annotations

from typing import Any

from dassl.evaluation.passes import Evaluation


class HookBase:
    """Behaviour attached to a run; every method may be left out. ``trainer`` is the SimpleTrainer.

    ``start``, ``before_epoch``, ``finish`` and ``close`` come from the loop itself; ``before_train``, ``after_epoch``
    and ``after_train`` from the trainer's methods of that name, which a method may replace; ``before_step``,
    ``after_step`` and ``between_steps`` from ``run_epoch``; ``after_test`` from ``test``.
    """

    def start(self, trainer: Any) -> None:
        """First of all; also when only evaluating."""

    def before_train(self, trainer: Any) -> None:
        """Before the first epoch."""

    def before_epoch(self, trainer: Any) -> None:
        """Before each epoch."""

    def before_step(self, trainer: Any) -> None:
        """The batch is there, the step is not yet made."""

    def after_step(self, trainer: Any) -> None:
        """The step is made."""

    def between_steps(self, trainer: Any) -> None:
        """All hooks have heard of the step: what the run has come to can be saved."""

    def after_epoch(self, trainer: Any) -> None:
        """After each epoch."""

    def after_test(self, trainer: Any, evaluation: Evaluation) -> None:
        """After each pass over a split."""

    def after_train(self, trainer: Any) -> None:
        """After the last epoch."""

    def finish(self, trainer: Any) -> None:
        """Last, when all went well; also when only evaluating."""

    def close(self, trainer: Any) -> None:
        """At the end of training, also after an error."""

    def state_dict(self, trainer: Any) -> dict[str, Any]:
        """What a resumed run must know: plain values, saved in every checkpoint."""
        return {}

    def load_state_dict(self, trainer: Any, state: dict[str, Any]) -> None:
        """Put ``state_dict`` back."""

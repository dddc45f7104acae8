"""Records of runs whose trainer brings a ``train`` or a ``test`` of its own, as trainers written for upstream do."""

from __future__ import annotations

import functools
from typing import Any

from dassl.evaluation.passes import of_own_test

__all__ = ["recorded_test", "recorded_train"]


def recorded_train(train: Any) -> Any:
    """Return a ``train`` method after which the run has its records, though the loop of TrainerBase may not have run.

    Where it has not, hooks hear of the beginning (from ``before_train``, if the method calls ours, else at the end) and
    of the end: config.yaml, metrics.json with what can be known, and DONE are written.
    """

    @functools.wraps(train)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        outermost = self.phase == "idle"
        self.own_loop = outermost
        try:
            result = train(self, *args, **kwargs)
            if outermost and self.own_loop:  # our loop, had it run, would have said that it did
                self.begin_records()
                self.phase = "final"
                self.call_hooks("finish")
            return result
        finally:
            if outermost and self.own_loop:
                self.phase = "idle"
                self.call_hooks("close")
                self.close_writer()

    return wrapped


def recorded_test(test: Any) -> Any:
    """Return a ``test`` method after which ``evaluation`` tells what can be known, though ours may not have run.

    Called outside of ``train``, it writes the run's result files, as ours does.
    """

    @functools.wraps(test)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        alone, before = self.phase == "idle", self.evaluation
        result = test(self, *args, **kwargs)
        if self.evaluation is before:
            split = kwargs.get("split") or (args[0] if args else None) or self.cfg.TEST.SPLIT
            self.evaluation = of_own_test(split, result, getattr(self, "evaluator", None))
            if alone:
                self.call_hooks("start")
                self.call_hooks("finish")
        return result

    return wrapped

"""Records of runs whose trainer brings a ``train`` or a ``test`` of its own, as trainers written for upstream do."""

from __future__ import annotations

import functools
from typing import Any

from dassl.evaluation.passes import of_own_test

__all__ = ["recorded_test", "recorded_train"]


def recorded_train(train: Any) -> Any:
    """Wrap a ``train`` method so that the run has its records even if the loop of TrainerBase has not run.

    If that loop has not run, hooks are still told of the beginning (by ``before_train``, if the method calls ours, else
    at the end) and of the end. So config.yaml, metrics.json with what can be known, and DONE are written.
    """

    @functools.wraps(train)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        outermost = self.phase == "idle"
        self.own_loop = outermost
        try:
            result = train(self, *args, **kwargs)
            if outermost and self.own_loop:  # our loop, had it run, would have set it to False
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
    """Wrap a ``test`` method so that ``evaluation`` tells what can be known even if our ``test`` has not run.

    If called outside of ``train``, the wrapped method writes the run's result files, as ours does.
    """

    @functools.wraps(test)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        alone, before = self.phase == "idle", self.evaluation
        result = test(self, *args, **kwargs)
        if self.evaluation is before:
            split = kwargs.get("split") or (args[0] if args else None) or self.cfg.TEST.SPLIT
            self.evaluation = of_own_test(split, result, self.evaluator)
            if alone:
                self.call_hooks("start")
                self.call_hooks("finish")
        return result

    return wrapped

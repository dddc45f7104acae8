"""The training loop, the hooks around it, and TensorBoard's writer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dassl.engine.checkpointing.generators import generator_states
from dassl.engine.checkpointing.keeper import Checkpoints
from dassl.engine.checkpointing.resume import Progress
from dassl.evaluation.passes import Evaluation
from dassl.utils.logger import DETAIL

from .parallel import copy_from_main
from .records import recorded_test, recorded_train
from .state import EpochStats
from .step import Steps
from .trackers import open_tracker

if TYPE_CHECKING:
    from .hooks import HookBase

logger = logging.getLogger(__name__)


class TrainerBase(Checkpoints, Steps):
    """Run the training loop, and tell hooks of its events.

    What a trainer says of itself stands in declared.py, registered models in models.py, the optimization step in
    step.py, and checkpoints in checkpointing/keeper.py.

    The methods ``before_train``, ``before_epoch``, ``run_epoch``, ``after_epoch``, ``after_train`` are there to be
    overridden; hooks hear of events through ``call_hooks``, so that a trainer that overrides one of the methods without
    calling its parent loses only what that method did.
    """

    def __init__(self) -> None:
        super().__init__()
        self._writer: Any = None
        self._hooks: list[HookBase] = []
        self.stats = EpochStats()
        self.selected = {}
        self.evaluation: Evaluation | None = None  # of the latest test
        self.own_loop = False  # whether a method's own ``train`` runs in place of the one below
        self.phase = "idle"  # "train" while epochs run, "final" from their end to the end of train()
        self.start_epoch = self.epoch = self.max_epoch = 0
        self.batch_idx = self.num_batches = 0
        self.output_dir = ""
        self.time_start: float | None = None
        self.steps_done = 0  # steps done in the running epoch; 0 between two epochs
        self.epoch_generators: dict[str, Any] = {}  # states of the random generators when the epoch began

    # ---- the loop

    def __init_subclass__(cls, **options: Any) -> None:
        """Wrap a ``train`` and a ``test`` that a class brings itself, so that its runs have their records, too."""
        super().__init_subclass__(**options)
        if cls.__module__.partition(".")[0] == "dassl":
            return
        for name, wrap in (("train", recorded_train), ("test", recorded_test)):
            if name in cls.__dict__:
                setattr(cls, name, wrap(cls.__dict__[name]))

    def train(self, start_epoch: int, max_epoch: int) -> None:
        """Run the epochs start_epoch..max_epoch-1 (before_train may move start_epoch, to resume)."""
        self.start_epoch, self.max_epoch = start_epoch, max_epoch
        self.own_loop = False
        self.begin_records()
        try:
            copy_from_main(self._models.values(), frozen=True)
            self.before_train()
            self.progress.begin()
            if self.has_training_step():
                if self.start_epoch >= self.max_epoch:
                    logger.info("Nothing left to train: %d of %d epochs are done", self.start_epoch, self.max_epoch)
                for self.epoch in range(self.start_epoch, self.max_epoch):  # noqa: B020
                    self.epoch_generators = generator_states()
                    self.call_hooks("before_epoch")
                    self.before_epoch()
                    self.run_epoch()
                    self.steps_done = 0
                    self.progress = Progress({})
                    self.after_epoch()
                self.epoch = max(self.max_epoch - 1, 0)  # a run without any epoch left stands there, too
            self.phase = "final"
            self.after_train()
            self.call_hooks("finish")
        finally:
            self.phase = "idle"
            self.guard.end()
            self.call_hooks("close")
            self.close_writer()

    def begin_records(self) -> None:
        """Tell the hooks that training begins, unless they have been told."""
        if self.phase == "idle":
            self.phase = "train"
            self.call_hooks("start")

    def has_training_step(self) -> bool:
        """Return whether there is anything to train; if not, the loop runs no epoch."""
        return type(self).trains(self.cfg)

    def before_train(self) -> None:
        """Prepare for training; called once before the first epoch."""

    def after_train(self) -> None:
        """Finish training; called once after the last epoch."""

    def before_epoch(self) -> None:
        """Prepare for an epoch; called before each epoch."""

    def after_epoch(self) -> None:
        """Finish an epoch; called after each epoch."""

    def run_epoch(self) -> None:
        """Make one pass over the training data."""
        raise NotImplementedError

    def test(self, split: str | None = None) -> float:
        """Evaluate and return the main result."""
        raise NotImplementedError

    def parse_batch_train(self, batch: Any) -> Any:
        """Take what forward_backward needs out of a training batch, on the device."""
        raise NotImplementedError

    def parse_batch_test(self, batch: Any) -> Any:
        """Take input and label out of a test batch, on the device."""
        raise NotImplementedError

    def forward_backward(self, batch: Any) -> dict[str, Any] | None:
        """Make one training step and return named numbers to show (``{"loss": ..., "acc": ...}``)."""
        raise NotImplementedError

    # ---- hooks

    def register_hooks(self, hooks: Iterable[HookBase]) -> None:
        """Append hooks; they are called in this order."""
        self._hooks.extend(hooks)

    def call_hooks(self, event: str, *args: Any) -> None:
        """Call the method ``event`` of every hook with this trainer and ``args``."""
        for hook in self._hooks:
            getattr(hook, event)(self, *args)

    def where(self) -> str:
        """Return the place in the run, counted from 1, for messages."""
        return f"epoch [{self.epoch + 1}/{self.max_epoch}] batch [{self.batch_idx + 1}/{self.num_batches}]"

    @property
    def global_step(self) -> int:
        """0-based number of the step over all epochs."""
        return self.epoch * self.num_batches + self.batch_idx

    # ---- TensorBoard

    @property
    def writer(self) -> Any:
        """The open Board (a SummaryWriter), or None."""
        return self.__dict__.get("_writer")

    def init_writer(self, log_dir: str | os.PathLike[str], purge_step: int | None = None) -> None:
        """Open TensorBoard's event file unless one is open; older values from ``purge_step`` on are hidden."""
        if self.writer is None and self.writes_files:
            from .board import Board  # slow to import, and needed only when training

            logger.info("Initialize tensorboard (log_dir=%s)", log_dir, extra=DETAIL)
            tracker = None if self.cfg is None else open_tracker(self.cfg.LOGGER, self.output_dir)
            self._writer = Board(log_dir, purge_step, tracker)

    def close_writer(self) -> None:
        """Close the event file if one is open."""
        if self.writer is not None:
            self._writer.close()
            self._writer = None

    def write_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None) -> None:
        """Write a number to TensorBoard, at the current step by default; nothing happens when no writer is open."""
        if self.writer is not None:
            step = self.global_step if global_step is None else global_step
            self._writer.add_scalar(tag, scalar_value, step)

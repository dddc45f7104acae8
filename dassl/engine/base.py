"""The loop itself, and the bookkeeping of registered models that every trainer shares."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dassl.data.sharding import Share
from dassl.utils import distributed, load_checkpoint, save_checkpoint, tolist_if_not
from dassl.utils.torchtools import BEST_NAME, checkpoint_entry, load_into, restore

from .evaluate import Evaluation
from .finite import StepGuard
from .generators import generator_states
from .parallel import average_gradients, copy_from_main
from .precision import Precision
from .records import recorded_test, recorded_train
from .resume import Found, Progress, has_checkpoints, newest_good, progress_state
from .state import EpochStats

if TYPE_CHECKING:
    from .hooks import HookBase

logger = logging.getLogger(__name__)

_Names = str | Sequence[str] | None


class TrainerBase:
    """Models by name, the training loop, and the hooks around it.

    The methods ``before_train``, ``before_epoch``, ``run_epoch``, ``after_epoch``, ``after_train`` are there to be
    overridden; hooks hear of events through ``call_hooks``, so that a trainer that overrides one of the methods without
    calling its parent loses only what that method did.

    Attributes:
        recipe: number of the method's recipe, raised when the same settings give other numbers than before. Runs of
            another recipe are neither gone on with nor taken for this one's.
        node_name: the key below TRAINER that holds the method's settings; "": the class's name in upper case.
    """

    recipe = 1
    node_name = ""

    @classmethod
    def config_node(cls) -> str:
        """Return the key below TRAINER that holds the method's settings."""
        return cls.node_name or cls.__name__.upper()

    def __init__(self) -> None:
        self._models: OrderedDict[str, nn.Module] = OrderedDict()
        self._optims: OrderedDict[str, Any] = OrderedDict()
        self._scheds: OrderedDict[str, Any] = OrderedDict()
        self._writer: Any = None
        self._hooks: list[HookBase] = []
        self.precision = Precision()
        self.guard = StepGuard()
        self.stepped = False  # whether the latest ``model_update`` changed the model
        self.stats = EpochStats()
        self.selected: dict[str, dict[str, Any]] = {}  # name -> {value, on, n}: what was chosen, on what
        self.evaluation: Evaluation | None = None  # the latest
        self.own_loop = False  # whether a ``train`` of the method's own runs, without ours
        self.phase = "idle"  # "train" while epochs run, "final" from their end to the end of train()
        self.start_epoch = self.epoch = self.max_epoch = 0
        self.batch_idx = self.num_batches = 0
        self.output_dir = ""
        self.share: Share | None = None  # of several processes: who has how much of this step's batch; None: all of it
        self._weighted = False  # whether the gradients there are come from a loss that was weighted
        self._averaged: set[int] = set()  # optimisers whose gradients are averaged already, by id
        self.steps_done = 0  # of the running epoch; 0 between two epochs
        self.epoch_generators: dict[str, Any] = {}  # as they were when the epoch began
        self.found: tuple[Path, Found] | None = None  # folder to resume from and the checkpoint there, until it is used
        self.progress = Progress({})  # of the checkpoint that was resumed from

    # ---- the loop

    def __init_subclass__(cls, **options: Any) -> None:
        """Have the records of a run written also by a class that brings a ``train`` or a ``test`` of its own."""
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
                self.epoch = max(self.max_epoch - 1, 0)  # where a run without any epoch left stands, too
            self.phase = "final"
            self.after_train()
            self.call_hooks("finish")
        finally:
            self.phase = "idle"
            self.guard.end()
            self.call_hooks("close")
            self.close_writer()

    def begin_records(self) -> None:
        """Tell the hooks that training begins, unless they know."""
        if self.phase == "idle":
            self.phase = "train"
            self.call_hooks("start")

    def has_training_step(self) -> bool:
        """False for methods that only evaluate; the loop then runs no epoch."""
        return True

    def before_train(self) -> None:
        """Called once before the first epoch."""

    def after_train(self) -> None:
        """Called once after the last epoch."""

    def before_epoch(self) -> None:
        """Called before each epoch."""

    def after_epoch(self) -> None:
        """Called after each epoch."""

    def run_epoch(self) -> None:
        """One pass over the training data."""
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
        """One training step; returns named numbers to show (``{"loss": ..., "acc": ...}``)."""
        raise NotImplementedError

    def model_inference(self, input: Any) -> Any:
        """Logits [B, C] for a test input."""
        raise NotImplementedError

    # ---- hooks

    def register_hooks(self, hooks: Iterable[HookBase]) -> None:
        """Append hooks; they are called in this order."""
        self._hooks.extend(hooks)

    def call_hooks(self, event: str, *args: Any) -> None:
        """Call the method ``event`` of every hook with this trainer and ``args``."""
        for hook in self._hooks:
            getattr(hook, event)(self, *args)

    # ---- registered models

    def register_model(self, name: str = "model", model: Any = None, optim: Any = None, sched: Any = None) -> None:
        """Have a model saved, switched between modes, stepped and scheduled under ``name``.

        Raises:
            AttributeError: called before ``super().__init__()``.
            ValueError: the name is taken.
        """
        if self.__dict__.get("_models") is None:
            raise AttributeError("Expected super().__init__() to be called before register_model() but it was not")
        if name in self._models:
            raise ValueError(f'Expected a new model name but got "{name}", which is registered')
        self._models[name] = model
        self._optims[name] = optim
        self._scheds[name] = sched
        if distributed.world_size() > 1 and hasattr(optim, "register_step_pre_hook"):
            # For trainers that step the optimiser themselves. Where they scale gradients, too, one rank may leave out a
            # step for an overflow that the others do not have; model_update, which averages first, has no such gap.
            optim.register_step_pre_hook(lambda optimizer, *arguments: self._average(optimizer))

    def get_model_names(self, names: _Names = None) -> list[str]:
        """All registered names, or ``names`` as a list after a check that they are registered."""
        known = list(self._models)
        if names is None:
            return known
        wanted = tolist_if_not(names)
        for name in wanted:
            if name not in known:
                raise KeyError(f'Expected a registered model ({", ".join(known)}) but got "{name}"')
        return wanted

    def set_model_mode(self, mode: str = "train", names: _Names = None) -> None:
        """Put registered models into mode "train", or "eval" (also called "test")."""
        if mode not in ("train", "eval", "test"):
            raise KeyError(f'Expected the mode to be "train", "eval" or "test" but got "{mode}"')
        for name in self.get_model_names(names):
            if self._models[name] is not None:
                self._models[name].train(mode == "train")

    def update_lr(self, names: _Names = None) -> None:
        """Step the schedulers."""
        for name in self.get_model_names(names):
            if self._scheds[name] is not None:
                self._scheds[name].step()

    def get_current_lr(self, names: _Names = None) -> float:
        """Learning rate of the first parameter group of the first model that has an optimiser; 0 without any."""
        for name in self.get_model_names(names):
            if self._optims[name] is not None:
                return self._optims[name].param_groups[0]["lr"]
        return 0.0

    # ---- the step

    def set_precision(self, prec: str) -> None:
        """Compute in fp32, fp16, amp or bf16 from now on; see Precision."""
        device = getattr(self, "device", torch.device("cpu"))
        self.precision = Precision(prec, torch.device(device).type)

    def where(self) -> str:
        """The place in the run, for messages; counted from 1."""
        return f"epoch [{self.epoch + 1}/{self.max_epoch}] batch [{self.batch_idx + 1}/{self.num_batches}]"

    @property
    def global_step(self) -> int:
        """0-based number of the step over all epochs."""
        return self.epoch * self.num_batches + self.batch_idx

    def detect_anomaly(self, loss: Tensor) -> None:
        """Raise a FloatingPointError that names the place when the loss is infinite or NaN."""
        if not torch.isfinite(loss).all():
            raise FloatingPointError(
                f"Expected the loss to be finite but got {loss.detach().flatten().tolist()[:4]} at {self.where()}"
            )

    def model_zero_grad(self, names: _Names = None) -> None:
        """Clear the gradients of the named models (all by default)."""
        self._weighted = False
        self._averaged.clear()
        for optimizer in self._optimizers(names):
            optimizer.zero_grad()

    def model_backward(self, loss: Tensor) -> bool:
        """Check the loss and back-propagate it; while a run's step runs, one that is not finite is left alone.

        ``model_update`` then changes nothing, and the step's end deals with it (TRAIN.ON_NAN).

        Returns:
            Whether the loss was back-propagated.

        Of several processes, each gives the mean over its part of the batch; it is weighted by the size of that part,
        so that the mean of the gradients is exactly that of the loss over the whole batch.
        """
        if not self.guard.active:
            self.detect_anomaly(loss)
        elif not self.guard.admits_loss(loss):
            return False
        if self.share is not None:
            self._weighted = True
            if self.share.weight != 1:
                loss = loss * self.share.weight
        self.precision.backward(loss)
        return True

    def average_gradients(self, names: _Names = None) -> None:
        """Average the gradients of the named models (all by default) over the processes.

        ``model_update`` does it. To be called before it only by what looks at gradients in between, such as clipping.
        """
        for optimizer in self._optimizers(names):
            self._average(optimizer)
            self._averaged.add(id(optimizer))

    def _average(self, optimizer: Any) -> None:
        if id(optimizer) in self._averaged or distributed.world_size() == 1:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.share is not None and self.share.weight != 1 and not self._weighted:
            for parameter in parameters:  # a trainer with a backward of its own
                if parameter.grad is not None:
                    parameter.grad.mul_(self.share.weight)
        average_gradients(parameters)

    def model_update(self, names: _Names = None) -> bool:
        """Step the optimisers of the named models (all by default) on the mean of the processes' gradients.

        The step is left out where its loss or a gradient is not finite (with a loss scale, which may overflow, the
        scale sees to that). Where it is made, ``after_update`` is called.

        Returns:
            Whether the step was made; ``stepped`` keeps it.
        """
        optimizers = self._optimizers(names)
        self.stepped = False
        if not self.guard.fault:
            self.average_gradients(names)
            if not self.guard.active:
                self.stepped = self.precision.update(optimizers)
            elif self.precision.scaler is not None:
                self.stepped = self.precision.update(optimizers, self._look)
            elif self.guard.admits_gradients(optimizers):
                self.stepped = self.precision.update(optimizers)
        self._averaged.clear()
        if self.stepped:
            self.after_update()
        return self.stepped

    def _look(self, gradients: Tensor | None) -> tuple[bool, bool]:
        """Whether the loss, and whether the gradients are finite; an overflow is no fault of the step's."""
        finite = self.guard.look(gradients)
        return not self.guard.fault, finite

    def after_update(self) -> None:
        """Move what follows the model from step to step: a running mean, a centre, a teacher.

        Called by ``model_update`` when the optimisers have stepped, and never for a step that is left out, so that
        numbers that were lost cannot get into what is moved here.
        """

    def model_backward_and_update(self, loss: Tensor, names: _Names = None) -> bool:
        """Zero the gradients, back-propagate the loss, check both, step; returns whether the step was made.

        On a GPU the program waits once, before the step, to read whether loss and gradients are finite.
        """
        self.model_zero_grad(names)
        with self.guard.one_look():
            self.model_backward(loss)
            return self.model_update(names)

    def _optimizers(self, names: _Names) -> list[Any]:
        return [self._optims[name] for name in self.get_model_names(names) if self._optims[name] is not None]

    # ---- TensorBoard

    @property
    def writer(self) -> Any:
        """The open Board (a SummaryWriter), or None."""
        return self.__dict__.get("_writer")

    def init_writer(self, log_dir: str | os.PathLike[str], purge_step: int | None = None) -> None:
        """Open TensorBoard's event file unless one is open; earlier values from ``purge_step`` on are hidden."""
        if self.writer is None and self.writes_files:
            from .board import Board  # slow to import, and needed only when training

            logger.info("Initialize tensorboard (log_dir=%s)", log_dir)
            self._writer = Board(log_dir, purge_step)

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

    def all_reduce_mean(self, tensor: Tensor) -> Tensor:
        """The mean over the whole batch of a step, where ``tensor`` is the mean over this process's part of it.

        For what is not a sum over images, such as a running centre; a new tensor, without gradient. To be called by all
        processes alike, as everything that talks to the others.
        """
        return distributed.all_reduce_mean(tensor, 1.0 if self.share is None else self.share.size)

    @property
    def writes_files(self) -> bool:
        """Whether this process writes the files of the run: of several, rank 0 alone does."""
        return distributed.is_main()

    # ---- checkpoints

    def engine_state(self) -> dict[str, Any]:
        """What a resumed run needs beside models and optimisers: plain values. All processes of a job call it.

        A trainer that keeps more from step to step, outside of registered models, offers it as ``run_state()`` and
        takes it back by ``load_run_state(state)``; so does a data manager, by ``state_dict`` and ``load_state_dict``.
        """
        hooks = {type(hook).__name__: hook.state_dict(self) for hook in self._hooks}
        own: dict[str, Any] = {}
        if hasattr(self, "run_state"):
            own["trainer"] = self.run_state()
        data: Any = getattr(self, "dm", None)
        if hasattr(data, "state_dict"):
            own["data"] = data.state_dict()
        config: Any = getattr(self, "cfg", None)
        if hasattr(config, "dump"):
            own["config"] = config.dump()
        own["recipe"] = self.recipe
        return {
            "selected": self.selected,
            "precision": self.precision.state_dict(),
            "hooks": {name: state for name, state in hooks.items() if state},
            **own,
            **progress_state(self),
        }

    def load_engine_state(self, state: dict[str, Any]) -> None:
        """Put ``engine_state`` back; entries that a file lacks (it may be upstream's) are left as they are."""
        self.selected = dict(state.get("selected", self.selected))
        self.precision.load_state_dict(state.get("precision", {}))
        self.progress = Progress(state)
        if "trainer" in state and hasattr(self, "load_run_state"):
            self.load_run_state(state["trainer"])
        data: Any = getattr(self, "dm", None)
        if "data" in state and hasattr(data, "load_state_dict"):
            data.load_state_dict(state["data"])
        saved = state.get("hooks", {})
        for hook in self._hooks:
            if type(hook).__name__ in saved:
                hook.load_state_dict(self, saved[type(hook).__name__])

    def save_model(
        self,
        epoch: int,
        directory: str | os.PathLike[str],
        is_best: bool = False,
        val_result: float | None = None,
        model_name: str = "",
    ) -> None:
        """Write a checkpoint of every registered model to ``<directory>/<name>/``; ``epoch`` counts from 0.

        Of several processes all call it, rank 0 writes, and all go on when the files are there.
        """
        engine = self.engine_state()
        for name in self.get_model_names() if self.writes_files else ():
            optim, sched = self._optims[name], self._scheds[name]
            save_checkpoint(
                {
                    "state_dict": self._models[name].state_dict(),
                    "epoch": epoch + 1,
                    "optimizer": None if optim is None else optim.state_dict(),
                    "scheduler": None if sched is None else sched.state_dict(),
                    "val_result": val_result,
                    "engine": engine,
                },
                Path(directory) / name,
                is_best=is_best,
                model_name=model_name,
            )
        distributed.barrier()

    def resume_model_if_exist(self, directory: str | os.PathLike[str]) -> int:
        """Load the newest checkpoint of every registered model when all have one there.

        Returns:
            The epoch to go on with; 0 when there is nothing to resume.
        """
        found = self._find_checkpoint(Path(directory))
        self.found = None
        if found is None:
            logger.info("No checkpoint found, train from scratch")
            return 0
        logger.info("Found checkpoint at %s (will resume training)", directory)
        epoch = 0
        for position, (name, (path, checkpoint)) in enumerate(found.items()):
            logger.info('Loading checkpoint from "%s"', path)
            epoch = restore(checkpoint, path, self._models[name], self._optims[name], self._scheds[name])
            if position == 0:  # the same in all of them
                self.load_engine_state(checkpoint.get("engine") or {})
        if self.progress.step:
            logger.info("and %d batches of the next", self.progress.step)
        return epoch

    def _find_checkpoint(self, directory: Path) -> Found | None:
        """The checkpoint in a folder that training goes on with; None: there is none."""
        if self.found is None or self.found[0] != directory:
            names = self.get_model_names()
            found = newest_good(directory, names) if has_checkpoints(directory, names) else None
            self.found = None if found is None else (directory, found)
        return None if self.found is None else self.found[1]

    def load_model(self, directory: str | os.PathLike[str], epoch: int | None = None) -> None:
        """Load every registered model strictly from ``<directory>/<name>/``.

        Args:
            directory: empty: nothing is loaded, with a note.
            epoch: 1-based number of a checkpoint; None: the best one.

        Raises:
            FileNotFoundError: there is no such checkpoint; the message lists those there are.
            InputError: it cannot be read, or does not fit.
        """
        if not directory:
            logger.info(
                "Note that load_model() is skipped as no pretrained model is given "
                "(ignore this if it's done on purpose)"
            )
            return
        file_name = BEST_NAME if epoch is None else f"model.pth.tar-{epoch}"
        for name in self.get_model_names():
            path = Path(directory) / name / file_name
            if not path.is_file():
                found = sorted(p.name for p in path.parent.glob("model*.pth.tar*") if p.suffix != ".sha256")
                raise FileNotFoundError(f'Expected a model at "{path}" but found {", ".join(found) or "none"} there')
            checkpoint = load_checkpoint(path)
            load_into(self._models[name], checkpoint_entry(checkpoint, "state_dict", path), path, "model")
            val_result = checkpoint.get("val_result")
            logger.info(
                "Load %s to %s (epoch=%s, val_result=%s)",
                path,
                name,
                checkpoint.get("epoch"),
                "none" if val_result is None else f"{val_result:.1f}",
            )
            self.selected.update((checkpoint.get("engine") or {}).get("selected", {}))

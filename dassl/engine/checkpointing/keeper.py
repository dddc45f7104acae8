"""Save and load all that a run consists of: models, optimizers, and the state of engine, hooks and method."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dassl.engine.models import RegisteredModels
from dassl.utils import distributed, load_checkpoint, save_checkpoint
from dassl.utils.checkpoints import BEST_NAME, checkpoint_entry, load_into, restore
from dassl.utils.logger import DETAIL

from .resume import Found, Progress, has_checkpoints, newest_good, progress_state

if TYPE_CHECKING:
    from dassl.engine.hooks import HookBase
    from dassl.engine.precision import Precision

logger = logging.getLogger(__name__)


class Checkpoints(RegisteredModels):
    """Write checkpoints of the registered models, find them again, and go on with them."""

    precision: Precision
    _hooks: list[HookBase]

    def __init__(self) -> None:
        super().__init__()
        self.found: tuple[Path, Found] | None = None  # folder to resume from and the checkpoint there, until it is used
        self.progress = Progress({})  # of the checkpoint that was resumed from

    def engine_state(self) -> dict[str, Any]:
        """Return what a resumed run needs beside models and optimizers, as plain values.

        All processes of a job must call it. A trainer that keeps more from step to step, outside of registered models,
        offers it as ``run_state()`` and takes it back by ``load_run_state(state)``; so does a data manager, by
        ``state_dict`` and ``load_state_dict``.
        """
        whole: Any = self  # hooks are written for the whole trainer
        hooks = {type(hook).__name__: hook.state_dict(whole) for hook in self._hooks}
        own: dict[str, Any] = {"recipe": self.recipe}
        state = self.run_state()
        if state:
            own["trainer"] = state
        if hasattr(self.dm, "state_dict"):  # a method may bring a data manager that keeps something
            own["data"] = self.dm.state_dict()
        if self.cfg is not None:
            own["config"] = self.cfg.dump()
        return {
            "selected": self.selected,
            "precision": self.precision.state_dict(),
            "hooks": {name: state for name, state in hooks.items() if state},
            **own,
            **progress_state(whole),
        }

    def load_engine_state(self, state: dict[str, Any]) -> None:
        """Put ``engine_state`` back; entries that a file lacks (it may be upstream's) are left as they are."""
        self.selected = dict(state.get("selected", self.selected))
        self.precision.load_state_dict(state.get("precision", {}))
        self.progress = Progress(state)
        if "trainer" in state:
            self.load_run_state(state["trainer"])
        if "data" in state and hasattr(self.dm, "load_state_dict"):
            self.dm.load_state_dict(state["data"])
        whole: Any = self
        saved = state.get("hooks", {})
        for hook in self._hooks:
            if type(hook).__name__ in saved:
                hook.load_state_dict(whole, saved[type(hook).__name__])

    def save_model(
        self,
        epoch: int,
        directory: str | os.PathLike[str],
        is_best: bool = False,
        val_result: float | None = None,
        model_name: str = "",
    ) -> None:
        """Write a checkpoint of every registered model to ``<directory>/<name>/``; ``epoch`` counts from 0.

        All processes of a job must call it: rank 0 writes, and all go on when the files are there.
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
        """Load the newest checkpoint of every registered model if all models have one in the folder.

        Returns:
            The epoch to go on with; 0 when there is nothing to resume.
        """
        found = self._find_checkpoint(Path(directory))
        self.found = None
        if found is None:
            logger.info("No checkpoint found, train from scratch", extra=DETAIL)
            return 0
        logger.info("Found checkpoint at %s (will resume training)", directory)
        epoch = 0
        for position, (name, (path, checkpoint)) in enumerate(found.items()):
            logger.info('Loading checkpoint from "%s"', path, extra=DETAIL)
            epoch = restore(checkpoint, path, self._models[name], self._optims[name], self._scheds[name])
            if position == 0:  # the engine's state is the same in all of them
                self.load_engine_state(checkpoint.get("engine") or {})
        if self.progress.step:
            logger.info("and %d batches of the next", self.progress.step)
        return epoch

    def _find_checkpoint(self, directory: Path) -> Found | None:
        """Return the checkpoint in a folder that training goes on with; None: there is none."""
        if self.found is None or self.found[0] != directory:
            names = self.get_model_names()
            found = newest_good(directory, names) if has_checkpoints(directory, names) else None
            self.found = None if found is None else (directory, found)
        return None if self.found is None else self.found[1]

    def load_model(self, directory: str | os.PathLike[str], epoch: int | None = None) -> None:
        """Load every registered model strictly from ``<directory>/<name>/``.

        Args:
            directory: the run's folder; empty: nothing is loaded, and a log line says so.
            epoch: 1-based number of a checkpoint; None: the best one.

        Raises:
            FileNotFoundError: there is no such checkpoint; the message lists those there are.
            InputError: the checkpoint cannot be read, or does not fit.
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

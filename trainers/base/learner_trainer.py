"""Check, save and load what a method learns beside the frozen CLIP."""

from __future__ import annotations

import logging
import os
import os.path as osp
from collections.abc import Mapping
from typing import Any

from dassl.utils import load_checkpoint

from ..portable import class_indices
from .clip_trainer import CLIPTrainer

logger = logging.getLogger(__name__)


class LearnerTrainer(CLIPTrainer):
    """A trainer whose `network` has a `learner`, which is trained or fitted, and saved in the folder `model_name`."""

    network: Any

    # Checkpoints

    def load_model(self, directory: str | os.PathLike[str], epoch: int | None = None) -> None:
        """Load what an earlier run learnt, perhaps on another dataset.

        Args:
            directory: output folder of that run; empty: nothing is loaded.
            epoch: the checkpoint after that many epochs; None: the best one, or the latest where none was called best.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: the checkpoint was made by something else, for another CLIP or for other classes.
        """
        if not directory:
            logger.info("load_model() is skipped: no model folder is given")
            return
        method = type(self).__name__
        path = checkpoint_path(directory, self.model_name, epoch, method)
        checkpoint = load_checkpoint(path)
        self.take_checkpoint(checkpoint, path)
        logger.info("Loaded %s (epoch %s)", path, checkpoint.get("epoch"))

    def take_checkpoint(self, checkpoint: Any, source: str | os.PathLike[str]) -> None:
        """Take over what a checkpoint holds.

        Args:
            checkpoint: what an earlier run wrote: "state_dict", and "engine" with what it had chosen.
            source: the file that it comes from, for messages.

        Raises:
            ValueError: the checkpoint was made by something else, for another CLIP or for other classes.
        """
        state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
        if not isinstance(state, Mapping):
            raise ValueError(f"Expected a checkpoint of {type(self).__name__} but got something else: {source}")
        try:
            self.network.learner.take(state, class_indices(self.dm.dataset))
        except ValueError as error:
            raise ValueError(f"{error}: {source}") from error
        self.after_load(checkpoint)

    def after_load(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over what a loaded checkpoint holds beside the weights: which settings were chosen, and on what."""
        self.selected = dict((checkpoint.get("engine") or {}).get("selected", {}))


def checkpoint_path(directory: str | os.PathLike[str], model_name: str, epoch: int | None, method: str) -> str:
    """Find the file of a checkpoint.

    Args:
        directory: output folder of the run.
        model_name: the folder of its checkpoints in there.
        epoch: the checkpoint after that many epochs; None: the best one, or the latest where none was called best.
        method: the trainer's name, for the message.

    Raises:
        FileNotFoundError: there is no such checkpoint.
    """
    folder = osp.join(directory, model_name)
    if epoch is not None:
        name = f"model.pth.tar-{epoch}"
    else:
        name, pointer = "model-best.pth.tar", osp.join(folder, "checkpoint")
        if not osp.exists(osp.join(folder, name)):
            if not osp.exists(pointer):
                raise FileNotFoundError(f"Expected a checkpoint of {method} in {folder} but there is none")
            with open(pointer, encoding="utf-8") as file:
                name = osp.basename(file.readline().strip()) or name
    path = osp.join(folder, name)
    if not osp.exists(path):
        raise FileNotFoundError(f"Expected a checkpoint at {path} but there is none")
    return path

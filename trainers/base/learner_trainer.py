"""Check, save and load what a method learns beside the frozen CLIP."""

from __future__ import annotations

import logging
import os
import os.path as osp
from collections.abc import Mapping
from typing import Any

from dassl.utils import load_checkpoint

from .checks import check_choice
from .clip_trainer import PRECISIONS, CLIPTrainer

logger = logging.getLogger(__name__)


class LearnerTrainer(CLIPTrainer):
    """A trainer whose `network` has a `learner`: what is trained or fitted, and saved in the folder `model_name`."""

    network: Any
    model_name = ""

    # Configuration

    def check_cfg(self, cfg: Any) -> None:
        """Checks all that can be checked before data and CLIP are loaded.

        Raises:
            ValueError: a wrong key in the trainer's node, or a backbone that does not exist.
            FileNotFoundError: the backbone's weights are not there.
        """
        name = self.node_name
        if name not in cfg.TRAINER:
            raise ValueError(f"Expected the configuration to have a node TRAINER.{name} but got none: call extend_cfg")
        check_choice(cfg, f"TRAINER.{name}.PREC", PRECISIONS)
        self.check_node(cfg)
        self.check_clip_cfg(cfg)

    def check_node(self, cfg: Any) -> None:
        """Checks the keys of the trainer's node but PREC."""

    # Checkpoints

    def load_model(self, directory: str | os.PathLike[str], epoch: int | None = None) -> None:
        """Loads what an earlier run learnt; its dataset may be another one.

        Args:
            directory: output folder of that run; empty: nothing is loaded.
            epoch: the checkpoint after that many epochs; None: the best one, or the latest where none was called best.

        Raises:
            FileNotFoundError: no such checkpoint.
            ValueError: it was made by something else, for another CLIP or for other classes.
        """
        if not directory:
            logger.info("load_model() is skipped: no model folder is given")
            return
        method = type(self).__name__
        path = checkpoint_path(directory, self.model_name, epoch, method)
        checkpoint = load_checkpoint(path)
        state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
        if not isinstance(state, Mapping):
            raise ValueError(f"Expected a checkpoint of {method} but got something else: {path}")
        try:
            self.network.learner.take(state, getattr(self.dm.dataset, "class_indices", None))
        except ValueError as error:
            raise ValueError(f"{error}: {path}") from error
        self.selected = dict((checkpoint.get("engine") or {}).get("selected", {}))
        logger.info("Loaded %s (epoch %s)", path, checkpoint.get("epoch"))


def checkpoint_path(directory: str | os.PathLike[str], model_name: str, epoch: int | None, method: str) -> str:
    """The file of a checkpoint: of that epoch, or (None) the best one, or the latest where none was called best.

    Raises:
        FileNotFoundError: there is none.
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

"""Offer the base class of all our trainers: the same methods on our own toolbox and on an upstream Dassl.

Upstream does not scale gradients, evaluates one head only, runs one process only, and never leaves out a step.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import torch
from torch import Tensor

from dassl.engine import TrainerX

from .compat import is_ours

logger = logging.getLogger(__name__)

OWN_TOOLBOX = is_ours(TrainerX)  # False: the toolbox is upstream's


class PortableTrainer(TrainerX):
    """Offer the same methods on our toolbox and on upstream's; this class is for ours.

    `_autocast()` gives the context in which the forward pass runs.
    """

    def _set_up_precision(self, prec: str) -> None:
        """Compute in this precision from now on."""
        self.set_precision(prec)
        self._autocast: Any = self.precision.autocast

    def _scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the loss scale, where there is one."""
        return loss if self.precision.scaler is None else self.precision.scaler.scale(loss)

    def _unscale(self, optim: Any) -> None:
        """Divide the gradients by the loss scale, where there is one."""
        if self.precision.scaler is not None:
            self.precision.scaler.unscale_(optim)


if not OWN_TOOLBOX:

    class PortableTrainer(TrainerX):  # type: ignore[no-redef]
        """Add to upstream's trainer the methods that ours has and upstream's lacks."""

        _collect: Any  # see CLIPTrainer
        trains: Any

        share = None  # how processes share a step's batch; upstream runs one process only
        writes_files = True
        main_head = ""

        def _set_up_precision(self, prec: str) -> None:
            self._autocast: Any = contextlib.nullcontext
            if prec == "amp":
                logger.info("This toolbox cannot scale gradients: amp means bfloat16 here, which needs no scaling")
                self._autocast = lambda: torch.autocast(self.device.type, dtype=torch.bfloat16)

        def _scale(self, loss: Tensor) -> Tensor:
            return loss

        def _unscale(self, optim: Any) -> None:
            pass

        def average_gradients(self, names: Any = None) -> None:
            """Leave the gradients as they are: there is one process only."""

        def after_update(self) -> None:
            """Move what follows the model from step to step."""

        def model_backward(self, loss: Tensor) -> bool:
            """Back-propagate the loss; upstream raises an error where the loss is not finite."""
            super().model_backward(loss)
            return True

        def model_update(self, names: Any = None) -> bool:
            """Step the optimizers and call `after_update`; upstream never leaves out a step."""
            super().model_update(names)
            self.stepped = True
            self.after_update()
            return True

        def model_backward_and_update(self, loss: Tensor, names: Any = None) -> bool:
            """Back-propagate the loss and step."""
            self.model_zero_grad(names)
            self.model_backward(loss)
            return self.model_update(names)

        def get_current_lr(self, names: Any = None) -> float:
            """Return the learning rate; 0 where nothing is trained: upstream would look for an optimizer."""
            trained = [name for name in self.get_model_names(names) if self._optims[name] is not None]
            return super().get_current_lr(trained) if trained else 0.0

        def train(self) -> None:  # type: ignore[override]  # upstream's signature
            """Train; where there is nothing to train, go straight to the test: upstream's loop would ask for a step."""
            if type(self).trains(self.cfg):
                super().train()
            else:
                self.time_start = time.time()
                self.after_train()

        @property
        def writer(self) -> Any:
            """The open SummaryWriter, or None."""
            return self._writer

        def test(self, split: str | None = None) -> float:
            """Evaluate a split; upstream knows one head, so a second pass reports all of them."""
            result = super().test(split)
            split = split or self.cfg.TEST.SPLIT
            use_val = split == "val" and self.val_loader is not None
            heads, labels = self._collect(self.val_loader if use_val else self.test_loader)
            for head, logits in heads.items():
                accuracy = 100.0 * (logits.argmax(dim=1) == labels).float().mean().item()
                logger.info("* head %s: accuracy %.2f%%", head, accuracy)
                self.write_scalar(f"{'val' if use_val else 'test'}/{head}/accuracy", accuracy, self.epoch)
            return result


def class_indices(dataset: Any) -> list[int] | None:
    """Return the position of each class of a dataset among the classes trained on.

    None where the dataset does not know these positions; datasets of upstream never do.
    """
    return getattr(dataset, "class_indices", None)

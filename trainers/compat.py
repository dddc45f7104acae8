"""All that exists so that our trainers live beside other people's, and on an upstream Dassl.

Upstream refuses to register a name twice, knows no `_BASE_` in YAML files, scales no gradients, evaluates one head, and
runs one process.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from dassl.engine import TrainerX

logger = logging.getLogger(__name__)

BASE_KEY = "_BASE_"
OWN_TOOLBOX = callable(getattr(TrainerX, "set_precision", None))  # not upstream's


class PortableTrainer(TrainerX):
    """Offer the same methods on our toolbox and on upstream's; here on ours.

    `_autocast()` gives the context in which the forward pass runs.
    """

    def _set_up_precision(self, prec: str) -> None:
        """Compute in this precision from now on."""
        self.set_precision(prec)
        self._autocast: Any = self.precision.autocast

    def _unscale(self, optim: Any) -> None:
        """Divide the gradients by the loss scale, where there is one."""
        if self.precision.scaler is not None:
            self.precision.scaler.unscale_(optim)


if not OWN_TOOLBOX:

    class PortableTrainer(TrainerX):  # type: ignore[no-redef]
        """Offer on upstream's toolbox what ours has and upstream's has not."""

        _collect: Any  # see CLIPTrainer

        share = None  # of several processes; upstream knows one only
        writes_files = True
        main_head = ""

        def _set_up_precision(self, prec: str) -> None:
            self._autocast: Any = contextlib.nullcontext
            if prec == "amp":
                logger.info("This toolbox cannot scale gradients: amp means bfloat16 here, which needs no scaling")
                self._autocast = lambda: torch.autocast(self.device.type, dtype=torch.bfloat16)

        def _unscale(self, optim: Any) -> None:
            pass

        def average_gradients(self, names: Any = None) -> None:
            """Leave the gradients as they are."""

        def after_update(self) -> None:
            """Move what follows the model from step to step."""

        def model_backward(self, loss: Tensor) -> bool:
            """Back-propagate the loss; upstream stops at one that is not finite."""
            super().model_backward(loss)
            return True

        def model_update(self, names: Any = None) -> bool:
            """Step the optimisers and call `after_update`: upstream makes every step."""
            super().model_update(names)
            self.stepped = True
            self.after_update()
            return True

        def model_backward_and_update(self, loss: Tensor, names: Any = None) -> bool:
            """Back-propagate the loss and step."""
            self.model_zero_grad(names)
            self.model_backward(loss)
            return self.model_update(names)

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
    """Return which of the classes trained on a dataset's are, where it says so (upstream's never do)."""
    return getattr(dataset, "class_indices", None)


def first_come_first_served(registry: Any, package: str) -> None:
    """Have a registry admit a name that it knows, where one of the two is ours: the first stays, which is logged.

    Repositories of the CoOp family register CoOp, CoCoOp or ZeroshotCLIP themselves. Without this, whichever is
    imported second ends with a KeyError. Two classes of which neither is ours are still refused.

    Args:
        registry: Dassl's, ours or upstream's; changed in place, once.
        package: our package's name ("trainers" or "dlr_clip").
    """
    strict = registry.register
    if getattr(strict, "tolerant", False):
        return

    def is_ours(target: Any) -> bool:
        return str(target.__module__).partition(".")[0] == package

    def register(obj: Any = None, force: bool = False) -> Any:
        def add(target: Any) -> Any:
            name = target.__name__
            first = registry.get(name) if name in registry.registered_names() else None
            if first is not None and not force and is_ours(first) != is_ours(target):
                logger.warning(
                    "%s of %s stays registered, that of %s is left out", name, first.__module__, target.__module__
                )
            else:
                strict(target, force=force)
            return target

        return add if obj is None else add(obj)

    register.tolerant = True  # type: ignore[attr-defined]
    registry.register = register


def merge_from_file(cfg: Any, path: str | os.PathLike[str]) -> None:
    """Merge one of our YAML files into a configuration of an upstream Dassl, in place.

    As `cfg.merge_from_file`, but what the file that `_BASE_` names (relative to it) says is merged before.

    Args:
        cfg: an unfrozen yacs node, after `extend_cfg`.
        path: a file of configs/trainers, say.

    Raises:
        ValueError: a `_BASE_` that leads back to a file, or a file that is no YAML.
        KeyError: a key that this toolbox does not know; a setting of ours that it cannot follow is never passed over.
    """
    if getattr(type(cfg), "follows_base", False):  # our own toolbox's
        cfg.merge_from_file(path)
        return
    for values in yaml_chain(Path(path).expanduser()):
        cfg.merge_from_other_cfg(_as_node(type(cfg), values))


def yaml_chain(path: Path) -> list[dict[str, Any]]:
    """Return what a YAML file says, after what the file that its `_BASE_` names says, and so on: the farthest first.

    Raises:
        ValueError: a `_BASE_` that leads back to a file, or a file that is no YAML.
    """
    chain: list[dict[str, Any]] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            raise ValueError(f"Expected {BASE_KEY} to lead to a file without one but got a cycle at {path}")
        seen.append(path.resolve())
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"Expected {path} to be YAML but got: {' '.join(str(error).split())}") from error
        base = values.pop(BASE_KEY, None)
        chain.insert(0, values)
        if base is None:
            return chain
        path = path.parent / base


def _as_node(make: Callable[[dict[str, Any]], Any], values: Mapping[str, Any]) -> Any:
    return make({key: _as_node(make, value) if isinstance(value, Mapping) else value for key, value in values.items()})

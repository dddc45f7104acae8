"""Train the project's trainers from Python: the same configuration, data and training as on the command line.

A run here leaves the caller's random generators and console as they were, and writes no files unless it is told to.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dassl.config import CfgNode
from dassl.data import DataManager
from dassl.data.datasets import DatasetBase, Datum
from dassl.engine import TRAINER_REGISTRY, build_trainer
from dassl.engine.hooks import LearningRate, Losses, Timing
from dassl.evaluation.passes import as_heads
from dassl.utils import InputError, set_random_seed
from dassl.utils.cli import SETUP_ERRORS, given_wrongly
from dassl.utils.logger import muted
from dlr_clip_cli.train import parse_args

from ..app.building import explained
from ..app.configuration import setup_cfg
from ..app.prediction import main_head
from ..configs import configs_of

VALIDATION_SHARE = 0.2  # share of the images given that settings are chosen on


@dataclass(frozen=True)
class Choice:
    """A method with its settings.

    Attributes:
        method: name of a registered trainer.
        config: short name of one of its configurations; "": the one that fits the backbone. A name that begins with
            "_", such as "_plus", is added to the backbone's.
        settings: further keys and values.
        name: what people call it; "": the method's name.
    """

    method: str
    config: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    name: str = ""

    @property
    def shown(self) -> str:
        """The name that people read."""
        return self.name or self.method


def fitting_config(method: str, backbone: str, ending: str = "") -> str:
    """Return the short name of the configuration of a method that fits a backbone; "": the method has none.

    Args:
        ending: of the name, such as "_plus".
    """
    found = configs_of(method)
    own = backbone.lower().replace("-", "_").replace("/", "")
    similar = "tiny" if backbone == "tiny" else "rn50" if backbone.startswith("RN") else "vit_b16"
    for name in (own + ending, similar + ending, "vit_b16" + ending):
        if name in found:
            return name
    return "" if ending or not found else next(iter(found))


def is_path(config: str) -> bool:
    """Return whether a configuration is given by its file, and not by its short name."""
    return config.endswith((".yaml", ".yml"))


class GivenDataset(DatasetBase):
    """A dataset of items that the caller has; what is not given for testing is never tested on."""

    def __init__(self, train: list[Datum], val: list[Datum], test: list[Datum]) -> None:
        super().__init__(train_x=train, val=val or None, test=test or val or train)
        lines = [f"{item.impath} {item.label} {_size(item.impath)}" for item in (*train, *val)]
        self.data_digest = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


@dataclass(frozen=True)
class Runner:
    """Train methods on one backbone, with one seed.

    Attributes:
        backbone, weights: MODEL.BACKBONE.NAME and WEIGHTS.
        seed: decides everything random.
        device: "auto", "cpu" or "cuda".
        precision: "auto": fp32 without a GPU, else the method's own; or a value of PREC.
        settings: keys and values that the caller gives, for every method.
        verbose: whether to show lines and progress bars.
    """

    backbone: str
    weights: str = ""
    seed: int = 1
    device: str = "auto"
    precision: str = "auto"
    settings: tuple[tuple[str, Any], ...] = ()
    verbose: bool = False

    def config_of(self, choice: Choice) -> str:
        """Return the short name of a choice's configuration, or its file; "": there is none."""
        if choice.method in TRAINER_REGISTRY.registered_names() and (
            not choice.config or choice.config.startswith("_")
        ):
            return fitting_config(choice.method, self.backbone, choice.config)
        return choice.config

    def configure(self, choice: Choice, folder: str, output: str, shots: int = -1) -> CfgNode:
        """Return the frozen configuration of a run, through the same steps as train.py.

        Args:
            folder: of the images; "": they are given as items.
            output: folder of the run's files.
            shots: images of each class; -1: all.

        Raises:
            InputError: the method, the backbone or a setting is not known.
        """
        words = ["--trainer", choice.method, "--output-dir", output, "--seed", str(self.seed)]
        config = self.config_of(choice)
        if config:
            words += ["--config-file" if is_path(config) else "--config", config]
        args = parse_args(words)
        pairs: list[Any] = [
            "DATASET.NAME", "ImageFolder", "DATASET.ROOT", folder, "DATASET.NUM_SHOTS", shots,
            "MODEL.BACKBONE.NAME", self.backbone, "VERBOSE", self.verbose,
        ]  # fmt: skip
        if self.weights:
            pairs += ["MODEL.BACKBONE.WEIGHTS", self.weights]
        if self.device != "auto":
            pairs += ["USE_CUDA", self.device == "cuda"]
        on_gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        precision = self.precision if self.precision != "auto" else "" if on_gpu else "fp32"
        if precision and choice.method in TRAINER_REGISTRY.registered_names():
            pairs += [f"TRAINER.{TRAINER_REGISTRY.get(choice.method).config_node()}.PREC", precision]
        for key, value in (*choice.settings, *self.settings):
            pairs += [key, value]
        args.opts = pairs
        return setup_cfg(args)

    def configure_quietly(self, choice: Choice, output: str) -> CfgNode:
        """Return the configuration of a run on given items that is not tested at its end; see `configure`."""
        return self.configure(replace(choice, settings=(("TEST.NO_TEST", True), *choice.settings)), "", output)

    def data(self, cfg: CfgNode, items: Parts | None = None) -> DataManager:
        """Return the data manager of a run: of the items given, or of the folder that the configuration names."""
        trainer_class = TRAINER_REGISTRY.get(cfg.TRAINER.NAME)
        dataset = None if items is None else GivenDataset(*items)
        return DataManager(cfg, drop_last=trainer_class.drop_last, dataset=dataset)

    def build(self, cfg: CfgNode, items: Parts | None = None, files: bool = False) -> Any:
        """Return a trainer before its training.

        Args:
            items: the data; None: what the configuration names.
            files: whether it will write the files of a run on the command line.
        """
        with explained(cfg):
            data = self.data(cfg, items)
            return build_trainer(cfg, data, None if files else [Timing(), LearningRate(), Losses()])

    def train(self, cfg: CfgNode, items: Parts | None = None, files: bool = False) -> Any:
        """Return a trainer that has been trained, ready to classify; see `build`."""
        trainer = self.build(cfg, items, files)
        with explained(cfg, trainer):
            trainer.train()
        trainer.set_model_mode("eval")
        return trainer


Parts = tuple[list[Datum], list[Datum], list[Datum]]  # training, validation and test items


@contextlib.contextmanager
def wrong_input_told() -> Iterator[None]:
    """Raise an InputError within this block for everything that was given wrongly, as on the command line."""
    try:
        yield
    except SETUP_ERRORS as error:
        if isinstance(error, InputError) or not given_wrongly(error):
            raise
        raise InputError(str(error)) from error


@contextlib.contextmanager
def apart(seed: int, verbose: bool = False, warnings: bool = True) -> Iterator[None]:
    """Seed everything within this block, and leave the caller's generators and console as they were.

    Args:
        seed: as SEED of a run.
        verbose: whether lines and progress bars are shown.
        warnings: whether warnings are shown.
    """
    level = logging.INFO if verbose else logging.WARNING if warnings else logging.ERROR
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), muted(level):
        try:
            set_random_seed(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def logits_of(trainer: Any) -> tuple[Tensor, Tensor]:
    """Return the main head's logits [N, C] for a trainer's test images, in order, and the labels [N], on the CPU."""
    return collect_logits(trainer, trainer.test_loader)


@torch.no_grad()
def collect_logits(trainer: Any, loader: Any) -> tuple[Tensor, Tensor]:
    """Return the main head's logits [N, C] for the images of a loader, and the labels [N], on the CPU."""
    logits, labels = [], []
    for batch in loader:
        input, label = trainer.parse_batch_test(batch)
        with trainer.precision.autocast():
            heads: Mapping[str, Tensor] = as_heads(trainer.model_heads(input))
        logits.append(heads[main_head(trainer, heads)].float().cpu())
        labels.append(label.cpu())
    return torch.cat(logits), torch.cat(labels)


def draw_validation(items: Sequence[Datum], share: float, seed: int) -> tuple[list[Datum], list[Datum]]:
    """Return the items to train on, and those to choose settings on: a share of each class with four images or more."""
    by_label: dict[int, list[Datum]] = {}
    for item in items:
        by_label.setdefault(item.label, []).append(item)
    rng = random.Random(seed)
    train, val = [], []
    for label in sorted(by_label):
        mine = by_label[label]
        rng.shuffle(mine)
        count = round(share * len(mine)) if len(mine) >= FEWEST else 0
        val += mine[:count]
        train += mine[count:]
    return train, val


FEWEST = 4  # images of a class of which some are taken for validation

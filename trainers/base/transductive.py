"""Classify test images together: the sets of images that a transductive method is given, and its supports.

A transductive method looks at all images of a set before it classifies any of them. The set is the whole test set, or
each of many random tasks. Training images may be supports, whose labels are known.

Legend: Q queries (the images of a set), S supports, N images, C classes, E width of the features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..clip import CLIP
from ..features.encoder import Batch, FeatureSet
from ..features.loaders import FeatureLoader
from .feature_learner import FeatureLearner
from .feature_trainer import FeatureTrainer
from .keys import MethodConfig, key


def draw_tasks(labels: Tensor, size: int, classes: int, count: int, seed: int) -> list[list[int]]:
    """Draw the rows of `count` sets of `size` images, each from `classes` random classes.

    An image may be in several sets, but only once in each.

    Args:
        labels: [N].
        seed: decides the draws.

    Raises:
        ValueError: there are fewer classes, or too few images in some `classes` of them.
    """
    present = torch.unique(labels)
    if classes > len(present):
        raise ValueError(f"Expected tasks of at most {len(present)} classes but got {classes}")
    smallest = int(torch.bincount(labels)[present.long()].sort().values[:classes].sum())
    if smallest < size:
        raise ValueError(f"Expected tasks of at most {smallest} images from any {classes} classes but got {size}")
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for _ in range(count):
        chosen = present[torch.randperm(len(present), generator=generator)[:classes].to(present.device)]
        rows = torch.isin(labels, chosen).nonzero().flatten()
        tasks.append(rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)].tolist())
    return tasks


class TransductiveLoader(FeatureLoader):
    """A loader whose batches are classified as a whole: all images, or tasks where `size` is above 0.

    For the tasks see `draw_tasks`.
    """

    def __init__(self, loader: FeatureLoader, size: int = 0, classes: int = 0, count: int = 1, seed: int = 0) -> None:
        super().__init__(loader.loader, loader.encode, loader.slot)
        self._task = size, classes, count, seed

    def __len__(self) -> int:
        return self._task[2]

    def __iter__(self) -> Iterator[Batch]:
        known = self.all()
        self.regroup(draw_tasks(known.labels.cpu(), *self._task) if self._task[0] else [list(range(len(known)))])
        return super().__iter__()


class SupportLearner(FeatureLearner):
    """The supports, which are zeros until the fit. A subclass classifies the images that are given together.

    Args:
        n: number of supports; 0: zero-shot.
    """

    SAMPLES = ("support_labels", "supports")

    supports: Tensor
    support_labels: Tensor

    def __init__(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, *, n: int = 0) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.register_buffer("supports", torch.zeros(n, zeroshot.shape[1]))
        self.register_buffer("support_labels", torch.zeros(n, dtype=torch.long))


@dataclass(frozen=True)
class TransductiveConfig(MethodConfig):
    """Settings of every transductive method: which test images are classified together."""

    task_size: int = key(0, "test images that are classified together: 0: all of them; else tasks of that size", low=0)
    num_tasks: int = key(1000, "number of such tasks", low=1)
    task_classes: int = key(5, "random classes in each task", low=1)


class TransductiveTrainer(FeatureTrainer):
    """Classify every set of test images (all of them, or each task) as a whole.

    A method with a key SUPPORTS keeps the training images as supports where that is True; without, it is zero-shot.
    """

    cross_entropy = False

    @classmethod
    def trains(cls, cfg: Any) -> bool:
        """Return whether there are supports to keep; in the zero-shot case, a run goes straight to the test."""
        return bool(cfg.TRAINER[cls.node_name].get("SUPPORTS", False))

    @classmethod
    def each_class_has(cls, cfg: Any) -> str:
        """Return "images" where the training images are supports; else ""."""
        return "images" if cls.trains(cfg) else ""

    @property
    def num_supports(self) -> int:
        """The number of supports; 0: zero-shot."""
        return len(self.dm.dataset.train_x) if self.trains(self.cfg) else 0

    def _register(self, learner: FeatureLearner, optim_cfg: Any) -> None:
        if self.trains(self.cfg):
            super()._register(learner, optim_cfg)
        else:
            self._optim = None  # nothing to keep

    def fit(self, features: FeatureSet) -> dict[str, float]:
        """Keep the supports, and return their number."""
        learner: Any = self.network.learner
        learner.supports.copy_(features.values[0])
        learner.support_labels.copy_(features.labels)
        return {"supports": float(len(features))}

    def _set_up_loaders(self) -> None:
        super()._set_up_loaders()
        settings = self.settings
        labels = torch.tensor([item.label for item in self.dm.dataset.test or ()], dtype=torch.long)
        if settings.task_size and len(labels):
            draw_tasks(
                labels, settings.task_size, settings.task_classes, 0, 0
            )  # raises now what would otherwise be raised at the test
        self.test_loader = TransductiveLoader(
            self.test_loader, settings.task_size, settings.task_classes, settings.num_tasks, self._seed
        )
        if self.val_loader is not None:
            self.val_loader = TransductiveLoader(self.val_loader)

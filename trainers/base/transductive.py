"""Classify test images together: the sets of images that a transductive method is given, and its supports.

A transductive method looks at all images of a set before it classifies any of them. The set is the whole test set, or
each of many random tasks. Training images may be supports, whose labels are known.

Legend: Q queries (the images of a set), S supports, N images, C classes, E width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clip import CLIP
from ..features.encoder import FeatureSet
from .feature_learner import FeatureLearner
from .feature_trainer import FeatureTrainer
from .keys import MethodConfig, key


def draw_tasks(labels: Tensor, size: int, classes: int, count: int, seed: int, most: int = 0) -> list[list[int]]:
    """Draw the rows of `count` sets of `size` images, each from `classes` random classes.

    An image may be in several sets, but only once in each.

    Args:
        labels: [N], on the CPU.
        seed: decides the draws.
        most: above 0: each set has a random number of classes, from `classes` to this many. A set then has all classes,
            or all images of its classes, where there are fewer than asked for. Where each set would have all images,
            there is one.

    Raises:
        ValueError: without `most`, there are fewer classes, or too few images in some `classes` of them.
    """
    present = torch.unique(labels)
    if most and classes >= len(present) and size >= len(labels):
        return [list(range(len(labels)))]
    if not most:
        if classes > len(present):
            raise ValueError(f"Expected tasks of at most {len(present)} classes but got {classes}")
        smallest = int(torch.bincount(labels)[present].sort().values[:classes].sum())
        if smallest < size:
            raise ValueError(f"Expected tasks of at most {smallest} images from any {classes} classes but got {size}")
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for _ in range(count):
        number = int(torch.randint(classes, most + 1, (), generator=generator)) if most else classes
        chosen = present[torch.randperm(len(present), generator=generator)[:number]]
        rows = torch.isin(labels, chosen).nonzero().flatten()
        tasks.append(rows[torch.randperm(len(rows), generator=generator)[:size]].tolist())
    return tasks


def draw_streams(labels: Tensor, size: int, gamma: float, count: int, seed: int) -> list[list[int]]:
    """Draw `count` streams of all images, in which a class's images come together, and cut each into sets of `size`.

    A stream has as many slots as sets or classes, whichever are fewer. Each class shares its images out among the slots
    by a draw from a Dirichlet distribution. Within a slot the order is random. The images behind the last whole set of
    a stream are left out.

    Args:
        labels: [N], on the CPU.
        gamma: parameter of the Dirichlet distribution: the less, the fewer slots have images of a class; below 0: one
            class comes after the other, without slots.
        seed: decides the draws.

    Raises:
        ValueError: there are fewer than `size` images.
    """
    if size > len(labels):
        raise ValueError(f"Expected tasks of at most {len(labels)} images but got {size}")
    rng, of = np.random.default_rng(seed), labels.numpy()
    members = [np.flatnonzero(of == label) for label in np.unique(of)]
    slots = min(len(of) // size, len(members))
    tasks: list[list[int]] = []
    for _ in range(count):
        if gamma < 0:
            parts = [members[place] for place in rng.permutation(len(members))]
        else:
            ends = np.cumsum(rng.dirichlet([gamma] * slots, len(members)), axis=1)[:, :-1]
            shared = [np.split(rows, (end * len(rows)).astype(int)) for rows, end in zip(members, ends, strict=True)]
            parts = [np.concatenate(slot) for slot in zip(*shared, strict=True)]
        stream = np.concatenate([rng.permutation(part) for part in parts])
        tasks += stream[: len(stream) // size * size].reshape(-1, size).tolist()
    return tasks


class SupportLearner(FeatureLearner):
    """The supports, which are zeros until the fit. A subclass classifies the images that are given together.

    Args:
        n: number of supports until others are loaded.
        use_supports: whether there are any, or will be after loading; False: zero-shot.
    """

    SAMPLES = ("support_labels", "supports")

    supports: Tensor
    support_labels: Tensor

    def __init__(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, *, n: int, use_supports: bool) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.use_supports = use_supports
        self.register_buffer("supports", torch.zeros(n, zeroshot.shape[1]))
        self.register_buffer("support_labels", torch.zeros(n, dtype=torch.long))


@dataclass(frozen=True)
class TransductiveConfig(MethodConfig):
    """Settings of every transductive method: which test images are classified together."""

    task_size: int = key(0, "test images that are classified together: 0: all of them; else tasks of that size", low=0)
    num_tasks: int = key(1000, "number of such tasks; with STREAM: of streams", low=1)
    task_classes: int = key(5, "random classes in each task", low=1)
    task_classes_most: int = key(
        0,
        "each task has a random number of classes, from TASK_CLASSES to this many, as far as there are so many; "
        "0: TASK_CLASSES",
        low=0,
    )
    stream: float = key(
        0.0,
        "cut tasks one after the other from a random stream of all test images, along which a Dirichlet distribution "
        "with this parameter spreads each class: the less, the closer together; -1: class by class; 0: no stream",
        low=-1,
    )

    def check(self, path: str) -> None:
        """Check that tasks can be drawn as the keys say.

        Raises:
            ValueError: they contradict each other.
        """
        most, least = self.task_classes_most, self.task_classes
        if 0 < most < least:
            raise ValueError(
                f"Expected {path}.TASK_CLASSES_MOST to be 0 or at least TASK_CLASSES ({least}) but got {most}"
            )
        if -1 < self.stream < 0:
            raise ValueError(f"Expected {path}.STREAM to be -1, 0 or above 0 but got {self.stream:g}")
        if most and self.stream:
            raise ValueError(f"Expected {path}.TASK_CLASSES_MOST to be 0 with {path}.STREAM but got {most}")
        if (most or self.stream) and not self.task_size:
            raise ValueError(f"Expected {path}.TASK_SIZE to be above 0 where tasks are drawn but got 0")

    def draw(self, labels: Sequence[int], seed: int) -> list[list[int]]:
        """Return the rows of each set of test images with these labels.

        Raises:
            ValueError: there are too few classes or images.
        """
        if not self.task_size:
            return [list(range(len(labels)))]
        of = torch.tensor(labels)
        if self.stream:
            return draw_streams(of, self.task_size, self.stream, self.num_tasks, seed)
        return draw_tasks(of, self.task_size, self.task_classes, self.num_tasks, seed, self.task_classes_most)


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
        labels = [item.label for item in self.dm.dataset.test or ()]
        if labels:
            self.test_loader.regroup(self.settings.draw(labels, self._seed))
        if self.val_loader is not None:
            self.val_loader.regroup([list(range(len(self.val_loader.dataset)))])

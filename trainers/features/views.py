"""Repeat a dataset in several seeded augmentations ("views"), and mirror images."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class SeededViews(Dataset[Any]):
    """V augmentations of each item of a dataset; which one depends on seed, view and item alone.

    Neither the order, nor the batch size, nor the number of reader processes changes a view. Item k is view k // N of
    item k % N.

    Args:
        dataset: N items, each augmented by random draws whenever it is read.
        views: V, the number of augmentations of each item.
        seed: decides the augmentations; 0 or more.
    """

    def __init__(self, dataset: Any, views: int, seed: int) -> None:
        self.dataset = dataset
        self.views = views
        self.seed = seed

    def __len__(self) -> int:
        return self.views * len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        view, item = divmod(number, len(self.dataset))
        words = np.random.SeedSequence([self.seed, view, item]).generate_state(2, dtype=np.uint32)
        # torch.manual_seed would seed GPUs, too; where none has been used, it notes that for later, with a traceback.
        generator = torch.default_generator
        states = random.getstate(), np.random.get_state(), generator.get_state()
        try:
            random.seed(int(words[0]))
            np.random.seed(int(words[1]))
            generator.manual_seed(int(words[0]))
            return self.dataset[item]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            generator.set_state(states[2])


class Mirror:
    """A transform that mirrors an image tensor [..., H, W] left to right."""

    def __call__(self, image: Tensor) -> Tensor:
        return image.flip(-1)

    def __repr__(self) -> str:
        return "Mirror()"

"""Random CLIPs of toy size: what is tested here does not depend on what a CLIP knows."""

import pytest
import torch
from random_clip import NAMES, random_open_clip

from trainers.clip import CLIP


@pytest.fixture
def make_clip():
    """make_clip(kind="vit" | "resnet", ...) -> a frozen random CLIP."""

    def make(kind="vit", **arguments):
        return CLIP(random_open_clip(kind, **arguments), name=f"random-{kind}")

    return make


@pytest.fixture
def names():
    return list(NAMES)


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    return torch.tensor([0, 1, 2, 3, 4, 0])

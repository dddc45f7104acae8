"""Random CLIPs of toy size (what is tested does not depend on what a CLIP knows), and trainers built from a config."""

import pytest
import torch
from random_clip import NAMES, random_open_clip

from dassl.engine import build_trainer
from dassl.utils import set_random_seed
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


@pytest.fixture
def make(make_cfg):
    """Build a trainer by name, seeded, from the configuration that the test's own `make_cfg` gives for it."""

    def build(name, *pairs, **arguments):
        set_random_seed(1)
        return build_trainer(make_cfg(name, *pairs, **arguments))

    return build

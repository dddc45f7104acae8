"""Random CLIPs of toy size (what is tested does not depend on what a CLIP knows), and trainers built from a config."""

import pytest
import torch
from random_clip import NAMES, random_open_clip

import datasets
import trainers
from dassl.config import get_cfg_default
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
def small_run(tmp_path, random_tiny):
    """small_run(folder in configs/trainers, KEY, VALUE, ...) -> a `make_cfg` for its tiny.yaml: Digits, two shots."""

    def of(folder, *usual):
        def make(name, *pairs, out="run"):
            cfg = get_cfg_default()
            datasets.extend_cfg(cfg)
            trainers.extend_cfg(cfg)
            cfg.merge_from_file(f"configs/trainers/{folder}/tiny.yaml")
            cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / out), "DATASET.NAME", "Digits", "DATASET.NUM_SHOTS", 2])
            cfg.merge_from_list(["MODEL.BACKBONE.WEIGHTS", str(random_tiny), "USE_CUDA", False, "TEST.NO_TEST", True])
            cfg.merge_from_list(["FEATURE_CACHE.USE", False, *usual, *pairs])
            cfg.freeze()
            return cfg

        return make

    return of


@pytest.fixture
def make(make_cfg):
    """Build a trainer by name, seeded, from the configuration that the test's own `make_cfg` gives for it."""

    def build(name, *pairs, **arguments):
        set_random_seed(1)
        return build_trainer(make_cfg(name, *pairs, **arguments))

    return build

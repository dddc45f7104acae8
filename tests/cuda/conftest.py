"""Trainers on a small dataset, on the CPU and on a GPU: a test with `device` runs on both, where there is one."""

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import trainers
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.engine import TRAINER_REGISTRY, build_trainer
from dassl.utils import set_random_seed

NAMES = ("zero", "one", "two", "three", "four")
COUNTS = {"train": 4, "val": 2, "test": 20}
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
)
# What makes runs short, and equal on devices that draw different random numbers.
SHORT = {
    "CLIPLoRA": ("TRAINER.CLIPLORA.N_ITERS", 0, "TRAINER.CLIPLORA.DROPOUT", 0.0),
    "TwoStageFS": ("TRAINER.TWOSTAGEFS.N_ITERS", 0),
}


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 products in fp32: with TF32 a GPU and the CPU have three digits in common."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Noisy plain colors, one per class: split -> items."""
    folder, draws = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    colors, splits = draws.integers(0, 256, (len(NAMES), 3)), {}
    for split, count in COUNTS.items():
        splits[split] = []
        for label, name in enumerate(NAMES):
            for k in range(count):
                path = folder / f"{split}_{label}_{k}.png"
                pixels = np.clip(colors[label] + draws.normal(0, 40, (64, 64, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(path)
                splits[split].append(Datum(impath=str(path), label=label, classname=name))
    return splits


@pytest.fixture(autouse=True)
def registered(monkeypatch, pictures):
    """The dataset is registered while a test here runs only: other tests enumerate the registry."""

    class Colors(DatasetBase):
        def __init__(self, cfg):
            super().__init__(train_x=pictures["train"], val=pictures["val"], test=pictures["test"])

    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "Colors", Colors)


@pytest.fixture
def make(tmp_path, tiny_weights, random_adapters, random_tiny):
    """make(name, *pairs, device="cpu", out="run") -> a trainer on the tiny CLIP, seeded."""

    def build(name, *pairs, device="cpu", out="run"):
        cfg = get_cfg_default()
        datasets.extend_cfg(cfg)
        trainers.extend_cfg(cfg)
        cls = TRAINER_REGISTRY.get(name)
        needs = getattr(cls, "adapters", "none") == "needed"
        settings = [
            *("OUTPUT_DIR", str(tmp_path / out), "DATASET.NAME", "Colors", "DATASET.NUM_SHOTS", 4, "SEED", 1),
            *("MODEL.BACKBONE.NAME", "tiny", "MODEL.BACKBONE.WEIGHTS", str(random_tiny) if needs else tiny_weights),
            *("INPUT.SIZE", (64, 64), "INPUT.TRANSFORMS", ("normalize",), "USE_CUDA", device == "cuda"),
            *("DATALOADER.NUM_WORKERS", 0, "DATALOADER.TRAIN_X.BATCH_SIZE", 5, "DATALOADER.TEST.BATCH_SIZE", 50),
            *("OPTIM.NAME", "adamw", "OPTIM.LR", 1e-3, "OPTIM.LR_SCHEDULER", "cosine", "OPTIM.MAX_EPOCH", 1),
            *("TRAINER.NAME", name, "TRAINER.DLRCLIP.START", 2, "TRAINER.MMADAPTER.ADAPTER_START", 2),
            *("TRAINER.DLRCLIP.SCALE", 1.0, "VERBOSE", False, *SHORT.get(name, ())),
            *(("MODEL.IMO_WEIGHTS", str(random_adapters)) if needs else ()),
        ]
        if name in NODES_WITH_PREC:
            settings += [f"TRAINER.{cls.config_node()}.PREC", "fp32"]
        cfg.merge_from_list(settings + list(pairs))
        cfg.freeze()
        set_random_seed(1)
        return build_trainer(cfg)

    cfg = get_cfg_default()
    trainers.extend_cfg(cfg)
    names = TRAINER_REGISTRY.registered_names()
    nodes = {name: cfg.TRAINER.get(TRAINER_REGISTRY.get(name).config_node(), {}) for name in names}
    NODES_WITH_PREC = {name for name, node in nodes.items() if "PREC" in node}
    return build

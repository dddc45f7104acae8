"""A dataset of plain colors, a trainer on it, and what the tests here take from the helpers."""

import shutil

import numpy as np
import pytest
from PIL import Image
from random_clip import NAMES, random_open_clip
from view_loops import Uncached, epochs

import trainers
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.engine import build_trainer
from dassl.utils import set_random_seed
from trainers.clip import save_tiny

__all__ = [
    "NAMES", "ToyScenes", "Uncached", "epochs", "gone_on_after_one_epoch", "heads_on_test", "random_open_clip",
]  # fmt: skip

COLORS = np.random.default_rng(0).integers(0, 256, (8, 3))


class ToyScenes(DatasetBase):
    """Noisy plain colors, one per class: `train`, `val`, `test` images per class. Set OPTIONS to vary it."""

    OPTIONS: dict = {}

    def __init__(self, cfg):
        options = {"names": NAMES, "train": 4, "val": 2, "test": 3, "class_indices": None, "size": 32, **self.OPTIONS}
        folder, rng = cfg.DATASET.ROOT, np.random.default_rng(1)
        splits = {}
        for split in ("train", "val", "test"):
            splits[split] = []
            for label, name in enumerate(options["names"]):
                for k in range(options[split]):
                    path = f"{folder}/{split}_{label}_{k}.png"
                    noise = rng.normal(0, 40, (options["size"], options["size"], 3))
                    pixels = np.clip(COLORS[label] + noise, 0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(path)
                    splits[split].append(Datum(impath=path, label=label, classname=name))
        if options["class_indices"] is not None:
            self.class_indices = options["class_indices"]
        val = splits["test"] if options.get("val_is_test") else splits["val"] or None
        super().__init__(train_x=splits["train"], val=val, test=splits["test"])


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """ToyScenes is registered while a test here runs only: other tests enumerate the registry."""
    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "ToyScenes", ToyScenes)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Folders with two random tiny CLIPs, "a" and "b"."""
    root = tmp_path_factory.mktemp("weights")
    ids = range(0, 49408, 97)
    for seed, name in enumerate("ab"):
        save_tiny(random_open_clip(seed=seed), ids, {}, root / name)
    return root


@pytest.fixture
def dataset(monkeypatch):
    """dataset(names=[...], val=0, ...) -> what the next trainers find."""
    return lambda **options: monkeypatch.setattr(ToyScenes, "OPTIONS", options)


@pytest.fixture
def make_cfg(tmp_path, weights):
    def make(*pairs, out="run"):
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        cfg = get_cfg_default()
        trainers.extend_cfg(cfg)
        settings = {
            "OUTPUT_DIR": str(tmp_path / out),
            "USE_CUDA": False,
            "DATASET.NAME": "ToyScenes",
            "DATASET.ROOT": str(images),
            "INPUT.SIZE": (32, 32),
            "INPUT.TRANSFORMS": ("normalize",),
            "DATALOADER.NUM_WORKERS": 0,
            "DATALOADER.TRAIN_X.BATCH_SIZE": 5,
            "MODEL.BACKBONE.NAME": "tiny",
            "MODEL.BACKBONE.WEIGHTS": str(weights / "a"),
            "OPTIM.NAME": "adamw",
            "OPTIM.LR": 0.01,
            "OPTIM.LR_SCHEDULER": "cosine",
            "OPTIM.MAX_EPOCH": 2,
            "TRAINER.NAME": "DLRCLIP",
            "TRAINER.DLRCLIP.START": 2,
            "TRAINER.DLRCLIP.END": 3,
            "TRAINER.DLRCLIP.DIM": 8,
            "TRAINER.DLRCLIP.SCALE": 0.5,
            "TRAINER.DLRCLIP.GLR_DIM": 16,
            "TRAINER.DLRCLIP.FUSION_DIM": 8,
        }
        cfg.merge_from_list([item for pair in settings.items() for item in pair])
        cfg.merge_from_list(list(pairs))
        cfg.freeze()
        return cfg

    return make


@pytest.fixture
def make(make_cfg):
    def build(*pairs, **arguments):
        set_random_seed(1)
        return build_trainer(make_cfg(*pairs, **arguments))

    return build


def heads_on_test(trainer):
    """Logits of each head for all test images."""
    return trainer._collect(trainer.test_loader)[0]


def gone_on_after_one_epoch(make, pairs, tmp_path):
    """A run of two epochs of which the second is made anew, from a copy of the finished run in `run`."""
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    folder = tmp_path / "again" / "dlrclip"
    (folder / "model.pth.tar-2").unlink()
    (folder / "checkpoint").write_text("model.pth.tar-1\n")
    resumed = make(*pairs, out="again")
    resumed.train()
    return resumed

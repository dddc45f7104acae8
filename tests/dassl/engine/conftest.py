"""A dataset of colored squares and trainers on it, registered for the length of one test only."""

from __future__ import annotations

import random
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.engine import TRAINER_REGISTRY, TrainerX, TrainerXU, build_trainer
from dassl.engine.hooks import TensorBoard
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import set_random_seed

COLORS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


class ToyColors(DatasetBase):
    """Noisy colored squares, three classes; `DATASET.ROOT` has `empty_val` in its name: without validation images."""

    def __init__(self, cfg):
        root = Path(cfg.DATASET.ROOT)
        paint(root)
        parts = {
            part: [
                Datum(str(path), label, classname=name)
                for label, name in enumerate(COLORS)
                for path in sorted((root / part / name).iterdir())
            ]
            for part in ("train", "val", "test")
        }
        val = None if "empty_val" in root.name else parts["val"]
        super().__init__(train_x=parts["train"], train_u=parts["val"], val=val, test=parts["test"])


def paint(root: Path) -> None:
    rng = random.Random(0)
    for part, count in (("train", 6), ("val", 2), ("test", 4)):
        for name, color in COLORS.items():
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                noisy = tuple(value + rng.randint(-30, 30) for value in color)
                Image.new("RGB", (8, 8), noisy).save(folder / f"{i}.png")


class Linear(TrainerX):
    """Mean color -> logits; two registered models, so that everything is seen to work with more than one."""

    def build_model(self):
        self.net, self.bias = nn.Linear(3, self.num_classes, bias=False), nn.Linear(1, self.num_classes, bias=False)
        for name in ("net", "bias"):
            model = getattr(self, name).to(self.device)
            optim = build_optimizer(model, self.cfg.OPTIM)
            self.register_model(name, model, optim, build_lr_scheduler(optim, self.cfg.OPTIM))

    def model_inference(self, input):
        return self.net(input.mean(dim=(2, 3))) + self.bias(input.new_ones(1, 1))

    def forward_backward(self, batch):
        image, label, _ = self.parse_batch_train(batch)
        with self.precision.autocast():
            loss = F.cross_entropy(self.model_inference(image), label)
        self.model_backward_and_update(loss)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {"loss": loss.item()}


class TwoHeads(Linear):
    """The same with a second head that knows nothing."""

    main_head, reference_head = "after", "before"

    def model_heads(self, input):
        return {"before": torch.zeros(len(input), self.num_classes), "after": self.model_inference(input)}


class Unlabeled(TrainerXU):
    """Counts what it is given."""

    def build_model(self):
        self.seen: list[tuple[int, int]] = []
        self.net = nn.Linear(3, self.num_classes)
        self.register_model("net", self.net)

    def forward_backward(self, batch_x, batch_u):
        input_x, label_x, input_u = self.parse_batch_train(batch_x, batch_u)
        self.seen.append((len(label_x), len(input_u)))
        return {"loss": 1.0}

    def model_inference(self, input):
        return self.net(input.mean(dim=(2, 3)))


class ZeroShot(TrainerX):
    """Nothing to learn: red, green and blue are what they are."""

    def build_model(self):
        self.scale = 5.0

    def model_inference(self, input):
        return self.scale * input.mean(dim=(2, 3))


@pytest.fixture(autouse=True)
def registered(monkeypatch) -> None:
    """The registries are shared by the whole test run, and other tests enumerate them."""
    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "ToyColors", ToyColors)
    for cls in (Linear, TwoHeads, Unlabeled, ZeroShot):
        monkeypatch.setitem(TRAINER_REGISTRY._obj_map, cls.__name__, cls)


@pytest.fixture
def pictures() -> None:
    """For tests that want the pictures of a run."""


@pytest.fixture(autouse=True)
def no_pictures_unless_wanted(request, monkeypatch) -> None:
    """Drawing takes most of a small run's time."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(TensorBoard, "_pictures", lambda *arguments: None)


@pytest.fixture
def coop_style(monkeypatch):
    """The trainer file in CoOp's style, imported as a user's would be."""
    monkeypatch.setitem(TRAINER_REGISTRY._obj_map, "CoOpStyle", None)  # so that it is taken out again
    del TRAINER_REGISTRY._obj_map["CoOpStyle"]
    spec = util.spec_from_file_location("coop_style", Path(__file__).with_name("coop_style.py"))
    module = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "coop_style", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_cfg(tmp_path):
    def make(name: str = "Linear", *pairs: Any, output: str = "run", root: str = "data"):
        cfg = get_cfg_default()
        cfg.merge_from_list(["TRAINER.NAME", name, "DATASET.NAME", "ToyColors", "SEED", 3, "USE_CUDA", False])
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / output), "DATASET.ROOT", str(tmp_path / root)])
        cfg.merge_from_list(["INPUT.SIZE", (8, 8), "INPUT.TRANSFORMS", ("normalize",), "DATALOADER.NUM_WORKERS", 0])
        cfg.merge_from_list(["DATALOADER.TRAIN_X.BATCH_SIZE", 4, "DATALOADER.TEST.BATCH_SIZE", 5])
        cfg.merge_from_list(["OPTIM.NAME", "sgd", "OPTIM.LR", 0.1, "OPTIM.MAX_EPOCH", 3])
        cfg.merge_from_list(["OPTIM.LR_SCHEDULER", "cosine"])
        cfg.merge_from_list(list(pairs))
        cfg.freeze()
        return cfg

    return make


@pytest.fixture
def build(make_cfg):
    def make(name: str = "Linear", *pairs: Any, **where: str):
        cfg = make_cfg(name, *pairs, **where)
        set_random_seed(cfg.SEED)
        return build_trainer(cfg)

    return make

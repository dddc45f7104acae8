"""Trains our trainers for one epoch on an upstream Dassl, which must come first on the path.

    python upstream_run.py FOLDER WEIGHTS TRAINER...

Images, checkpoints and logs go to FOLDER; a line of JSON on stdout tells what came of each trainer. Packages that
upstream imports for datasets that nobody asks for here are stood in for where they are not installed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.machinery
import importlib.util
import io
import json
import re
import sys
import types
from pathlib import Path

FOLDER, WEIGHTS, NAMES = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]

MISSING = [name for name in ("gdown", "wilds", "pandas") if importlib.util.find_spec(name) is None]
for missing in MISSING:
    stand_in = types.ModuleType(missing)
    stand_in.__spec__ = importlib.machinery.ModuleSpec(missing, None)
    stand_in.get_dataset = None  # type: ignore[attr-defined]  # what upstream imports from wilds
    sys.modules[missing] = stand_in

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import dassl  # noqa: E402
from dassl.config import get_cfg_default  # noqa: E402
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum  # noqa: E402
from dassl.engine import TRAINER_REGISTRY, TrainerX, build_trainer  # noqa: E402
from dassl.utils import set_random_seed  # noqa: E402

for missing in MISSING:
    del sys.modules[missing]  # others, scikit-learn say, ask whether these are there


@TRAINER_REGISTRY.register()
class CoOp(TrainerX):
    """Somebody else's, registered before ours."""


HEARD = io.StringIO()
with contextlib.redirect_stdout(HEARD):
    trainers = importlib.import_module("trainers")

COLORS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "gray": (120, 120, 120)}
OWN = {"EMDirichlet": ["TRAINER.EMDIRICHLET.SUPPORTS", False]}  # without training images, as zero-shot CLIP
IMAGES = {"train": 4, "val": 3, "test": 5}  # of each class


@DATASET_REGISTRY.register()
class NoisyColors(DatasetBase):
    """Squares of a color with noise."""

    def __init__(self, cfg):
        parts: dict[str, list[Datum]] = {part: [] for part in IMAGES}
        rng = np.random.default_rng(0)
        for part, count in IMAGES.items():
            for label, (name, color) in enumerate(COLORS.items()):
                for number in range(count):
                    path = Path(cfg.DATASET.ROOT) / f"{part}_{name}_{number}.png"
                    pixels = np.clip(np.array(color) + rng.normal(0, 30, (64, 64, 3)), 0, 255)
                    Image.fromarray(pixels.astype(np.uint8)).save(path)
                    parts[part].append(Datum(impath=str(path), label=label, classname=name))
        super().__init__(train_x=parts["train"], val=parts["val"], test=parts["test"])


def run(name: str) -> dict[str, object]:
    """What came of a training."""
    cfg = get_cfg_default()
    trainers.extend_cfg(cfg)
    trainers.merge_from_file(cfg, trainers.find_config(name, "tiny"))
    cfg.merge_from_list(["TRAINER.NAME", name, "OUTPUT_DIR", str(FOLDER / name), "USE_CUDA", False])
    cfg.merge_from_list(["DATASET.NAME", "NoisyColors", "DATASET.ROOT", str(FOLDER), "DATALOADER.NUM_WORKERS", 0])
    cfg.merge_from_list(["MODEL.BACKBONE.WEIGHTS", WEIGHTS, "OPTIM.MAX_EPOCH", 1, "FEATURE_CACHE.USE", False])
    cfg.merge_from_list(["OPTIM.WARMUP_EPOCH", -1])  # upstream's warm-up does not run on current PyTorch
    cfg.merge_from_list(OWN.get(name, []))
    cfg.freeze()
    set_random_seed(1)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        trainer = build_trainer(cfg)
        before = copy.deepcopy({key: model.state_dict() for key, model in trainer._models.items()})
        trainer.train()
        heads = re.findall(r"^\* head (\w+): accuracy ([\d.]+)%$", said.getvalue(), re.MULTILINE)
        accuracy = trainer.test()  # upstream's evaluator, of the main head
    after = {key: model.state_dict() for key, model in trainer._models.items()}
    models = [FOLDER / name / model for model in trainer.get_model_names()]
    return {
        "accuracy": accuracy,
        "main": trainer.main_head,
        "heads": {head: float(value) for head, value in heads},
        "moved": any(not torch.equal(before[key][name], after[key][name]) for key in after for name in after[key]),
        "checkpoints": [str(path.relative_to(FOLDER)) for model in models for path in model.glob("model.pth.tar-1")],
    }


theirs = TRAINER_REGISTRY.get("CoOp") is CoOp
runs = {name: run(name) for name in NAMES}
print(json.dumps({"dassl": dassl.__file__, "theirs": theirs, "heard": HEARD.getvalue(), "runs": runs}))

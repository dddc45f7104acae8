"""The trainers that are measured: the real ones with their published settings, on a CLIP with random weights.

Neither weights nor data are fetched: `load_clip` gives one CLIP of `benchmarks.subject` for all trainers of a
precision, and the dataset lists a few images that are made here.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import trainers
from benchmarks.gpu.session import Session
from benchmarks.subject import build_clip, class_names
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.engine import TRAINER_REGISTRY, build_trainer
from dassl.utils import set_random_seed

ROOT = Path(__file__).resolve().parents[2]
NODES = {"DLRCLIP": "DLRCLIP", "CoOp": "COOP", "CLIPLoRA": "CLIPLORA", "MMA": "MMADAPTER"}
FOLDERS = {"DLRCLIP": "dlr", "CoOp": "coop", "CLIPLoRA": "cliplora", "MMA": "mma"}
# A toy's encoders are less deep than the blocks that the published settings begin with.
SHALLOW = {"DLRCLIP": ("TRAINER.DLRCLIP.START", 2), "MMA": ("TRAINER.MMADAPTER.ADAPTER_START", 2)}


def write_images(folder: Path, count: int, width: int = 500, height: int = 375) -> list[str]:
    """Write JPEG images with as much detail as photographs have (about 60 kB each); the same ones every time."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        path = folder / f"{width}x{height}_{number}.jpg"
        if not path.exists():
            draws = np.random.default_rng(number)
            large = draws.integers(0, 256, (6, 8, 3)).astype(np.uint8)
            pixels = np.asarray(Image.fromarray(large).resize((width, height), Image.Resampling.BICUBIC), dtype=float)
            fine = draws.normal(0, 12, (height // 2 + 1, width // 2 + 1, 3)).repeat(2, 0).repeat(2, 1)
            noisy = np.clip(pixels + fine[:height, :width] + draws.normal(0, 5, pixels.shape), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(path, quality=90)
        paths.append(str(path))
    return paths


def _dataset(names: Sequence[str], items: int, paths: Sequence[str]) -> type[DatasetBase]:
    class RandomImages(DatasetBase):
        check_files = False

        def __init__(self, cfg: Any) -> None:
            train = [
                Datum(paths[i % len(paths)], i % len(names), classname=names[i % len(names)])
                for i in range(max(items, len(names)))
            ]
            super().__init__(train_x=train, test=train[: len(names)])

    return RandomImages


def clip_of(session: Session, precision: str, device: torch.device) -> Any:
    """The session's CLIP with weights of this precision; built once."""
    kind = precision if precision in ("fp16", "bf16") else "fp32"  # amp keeps weights in fp32
    key = kind, device.type
    if key not in session.clips:
        session.clips[key] = build_clip(session.model, kind, device.type)
    return session.clips[key]


@contextlib.contextmanager
def _stand_ins(session: Session, cls: type, dataset: type[DatasetBase]) -> Iterator[None]:
    def load(name: str, weights: Any, precision: str, device: torch.device) -> Any:
        return clip_of(session, precision, device)

    def nothing(*arguments: Any) -> None:
        """In place of a check of weights that are not there."""

    where: list[dict[str, Any]] = []  # the modules that have these functions, wherever they lie
    for base in cls.__mro__:
        for function in vars(base).values():
            space = getattr(function, "__globals__", None)
            if space is not None and all(space is not other for other in where):
                where.append(space)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(DATASET_REGISTRY._obj_map, {"RandomImages": dataset}))
        for name, value in (("load_clip", load), ("check_backbone", nothing), ("tell_preprocessing", nothing)):
            for space in where:
                if name in space:
                    stack.enter_context(mock.patch.dict(space, {name: value}))
        yield


def trainer_of(
    session: Session,
    name: str,
    precision: str,
    classes: int,
    *pairs: Any,
    batch: int = 16,
    items: int = 0,
    paths: Sequence[str] = (),
    device: torch.device | None = None,
    names: Sequence[str] | None = None,
) -> Any:
    """A trainer as train.py would build it, in training mode.

    Args:
        session: says which CLIP.
        name: of the trainer.
        precision: its PREC.
        classes: C; their names as `class_names` gives them, or `names`.
        pairs: further settings.
        batch: images in a training batch.
        items: images of the training set, at least one per class.
        paths: their files, each used as often as it takes; empty: nothing that is measured reads them.
        device: where to, if not to the session's device.
    """
    device = session.device if device is None else device
    shallow = session.model in ("toy", "tiny")
    cfg = get_cfg_default()
    trainers.extend_cfg(cfg)
    trainers.merge_from_file(cfg, str(ROOT / "configs" / "trainers" / FOLDERS[name] / "vit_b16.yaml"))
    size = clip_of(session, precision, device).image_size
    settings = [
        *("OUTPUT_DIR", str(session.scratch / "run"), "DATASET.NAME", "RandomImages", "SEED", 1, "VERBOSE", False),
        *("MODEL.BACKBONE.NAME", session.model if session.model != "toy" else "tiny", "INPUT.SIZE", (size, size)),
        *("USE_CUDA", device.type == "cuda", "DATALOADER.NUM_WORKERS", 0, "FEATURE_CACHE.LIMIT", 0.0),
        *("DATALOADER.TRAIN_X.BATCH_SIZE", batch, f"TRAINER.{NODES[name]}.PREC", precision),
        *(SHALLOW.get(name, ()) if shallow else ()),
    ]
    cfg.merge_from_list([*settings, *pairs])
    cfg.freeze()
    dataset = _dataset(list(names or class_names(classes)), items, paths or ["none.jpg"])
    set_random_seed(1)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with _stand_ins(session, TRAINER_REGISTRY.get(name), dataset):
            trainer = build_trainer(cfg)
    finally:
        logging.disable(level)
    trainer.set_model_mode("train")
    trainer.num_batches = trainer.count_batches()
    return trainer


def random_batch(session: Session, size: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random normalized images [B, 3, S, S] and labels [B] on the CPU; on a machine with a GPU in pinned memory."""
    generator = torch.Generator().manual_seed(seed)
    side = clip_of(session, "bf16", session.device).image_size
    images = torch.randn(size, 3, side, side, generator=generator)
    labels = torch.randint(classes, (size,), generator=generator)
    return (images.pin_memory(), labels.pin_memory()) if session.cuda else (images, labels)

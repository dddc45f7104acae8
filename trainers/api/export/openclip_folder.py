"""Write and run folders that open_clip loads: CLIP with a method's weights, and the features of the classes beside.

Legend: B images, C classes, E width of the joint embedding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ...clip.backbones import resolve_backbone
from ...clip.tiny import read_record, tiny_files
from .forms import PLAIN, State, class_features
from .measures import Run
from .subject import Subject

CLASSES = "class_features.safetensors"
RECORD = "dlr_clip.json"


@torch.no_grad()
def merged_state(subject: Subject) -> tuple[State, Tensor]:
    """Return CLIP's weights with what the method has learnt, as open_clip calls them, and class features [C, E]."""
    trainer = subject.model.trainer
    clip = trainer.network.clip
    state: State = {}
    for name, value in clip.state_dict().items():  # our towers hold open_clip's modules
        state[name.removeprefix("text.").replace("visual.visual.", "visual.", 1)] = value
    state["logit_scale"] = torch.tensor(math.log(clip.logit_scale))
    features = PLAIN[subject.method](trainer, state)
    return {name: value.detach().clone().contiguous() for name, value in state.items()}, class_features(features)


def architecture(cfg: Any) -> dict[str, Any]:
    """Return the constructor arguments of the backbone's `open_clip.CLIP`."""
    name, weights = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.WEIGHTS
    if name == "tiny":
        return dict(read_record(tiny_files(weights or None)[0])["arch"])
    return dict(resolve_backbone(name).arch)


def write_openclip(subject: Subject, folder: Path, record: Mapping[str, Any]) -> None:
    """Write the folder: weights, configuration, class features, and a record."""
    state, features = merged_state(subject)
    preprocessing = subject.preprocessing
    folder.mkdir()
    save_file(state, str(folder / HF_SAFE_WEIGHTS_NAME))
    config = {
        "model_cfg": architecture(subject.model.trainer.cfg),
        "preprocess_cfg": {
            "size": preprocessing["size"],
            "mode": "RGB",
            "mean": preprocessing["mean"],
            "std": preprocessing["std"],
            "interpolation": preprocessing["interpolation"],
            "resize_mode": "squash" if preprocessing["squash"] else "shortest",
        },
    }
    (folder / HF_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({"features": features}, str(folder / CLASSES), metadata={"classes": json.dumps(record["classes"])})
    write_record(folder, record)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a folder."""
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def run_openclip(folder: Path) -> Run:
    """Return what classifies images with a folder's CLIP, which open_clip loads, and its class features."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    features = load_file(str(folder / CLASSES))["features"]
    temperature = json.loads((folder / RECORD).read_text(encoding="utf-8"))["temperature"]

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        logits = model.logit_scale.exp() * F.normalize(model.encode_image(images), dim=-1) @ features.t()
        return (logits / temperature).softmax(dim=1)

    return run


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())

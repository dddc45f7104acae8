"""Read weights that Hugging Face's `CLIPModel.save_pretrained` has written: a folder, or the file in it.

Their names and the layout of the attention's matrices are translated to those of ``open_clip.CLIP``; no number changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

FILES = ("model.safetensors", "pytorch_model.bin")  # of a folder, the safer one first
CONFIG = "config.json"

# Beginnings of names -> open_clip's. The order counts.
NAMES = (
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),  # their spelling
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
)
IN_A_BLOCK = (
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
PROJECTIONS = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}


def weights_file(path: Path) -> Path:
    """Return the file of weights in a folder that Hugging Face has written; another path comes back as it is.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: the folder is that of another kind of model.
    """
    if not path.is_dir():
        return path
    kind = read_config(path).get("model_type", "")
    if kind and kind != "clip":
        raise ValueError(f"Expected the folder {path} to be that of a CLIPModel but got a model of type {kind!r}")
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"Expected the folder {path} to hold {' or '.join(FILES)} but it has neither")


def read_config(folder: Path) -> dict[str, object]:
    """Return the configuration in a folder; empty where there is none, or it cannot be read."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def quick_gelu_of(path: Path) -> bool | None:
    """Return whether the configuration beside a file of weights asks for quick-GELU; None: it does not say."""
    config = read_config(path.parent)
    vision = config.get("vision_config")
    activation = vision.get("hidden_act") if isinstance(vision, Mapping) else None
    return None if activation is None else activation == "quick_gelu"


def is_hugging_face(names: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has Hugging Face's names."""
    return any(name.startswith(("text_model.", "vision_model.")) for name in names)


def as_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a `CLIPModel` with open_clip's names and layout; names that it has beside stay."""
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}  # name of the joint matrix -> q, k, v
    for name, value in state.items():
        if name.endswith(".position_ids"):  # a constant that older versions stored
            continue
        if name in PROJECTIONS:
            found[PROJECTIONS[name]] = value.t().contiguous()
            continue
        other = next((new + name.removeprefix(old) for old, new in NAMES if name.startswith(old)), name)
        for old, new in IN_A_BLOCK:
            other = other.replace(old, new)
        match = re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", other)
        if match:
            parts.setdefault(f"{match[1]}.attn.in_proj_{match[3]}", {})[match[2]] = value
        else:
            found[other] = value
    for name, three in parts.items():
        if set(three) == set("qkv"):
            found[name] = torch.cat([three[letter] for letter in "qkv"])
        else:
            found.update({f"{name}.{letter}": value for letter, value in three.items()})
    return found

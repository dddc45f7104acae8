"""Write and read low-rank updates of both encoders in the format of Hugging Face's PEFT, for its CLIPModel.

A folder holds adapter_config.json and adapter_model.safetensors, whose names are

    base_model.model.vision_model.encoder.layers.<block - 1>.self_attn.<q, k or v>_proj.lora_<A or B>.weight

and likewise with text_model. PEFT's scale is lora_alpha / r, or with use_rslora lora_alpha / sqrt(r), which is ours.

Legend: D width of a block, r rank.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .low_rank import PROJECTIONS, LowRank, LowRankUpdates

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TOWERS = {"visual": "vision_model", "text": "text_model"}  # ours -> theirs
NAME = re.compile(
    r"base_model\.model\.(vision|text)_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.lora_([AB])\.weight"
)
# Keys of PEFT's configuration that say nothing about what an adapter computes, or that are read here.
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"}
IDLE = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern", "task_type"),
    *("layers_to_transform", "megatron_core", "peft_version", "qalora_group_size", "revision", "target_modules"),
}


def is_peft(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds an adapter in PEFT's format."""
    return Path(folder, CONFIG).is_file()


def write_peft(folder: Path, towers: Mapping[str, LowRankUpdates], alpha: float, dropout: float, base: str) -> None:
    """Write low-rank updates of all blocks into a folder that exists.

    Args:
        folder: where the two files go.
        towers: the updates, "visual" and "text".
        alpha: each update's scale times the root of its rank.
        dropout: share of the updates' inputs that were dropped in training.
        base: name of the CLIPModel that they were trained on; "": unknown.
    """
    state, rank = {}, 0
    for tower, updates in towers.items():
        for number, which, module in parts(updates):
            rank = len(module.A)
            for letter, value in (("A", module.A), ("B", module.B)):
                state[peft_name(tower, number, which, letter)] = value.detach().float().cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "auto_mapping": {
            "base_model_class": "CLIPModel",
            "parent_library": "transformers.models.clip.modeling_clip",
        },
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": True,  # the scale is lora_alpha / sqrt(r)
        "lora_dropout": dropout,
        "target_modules": [f"{which}_proj" for which in PROJECTIONS],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    save_file(state, str(folder / WEIGHTS), metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def parts(updates: LowRankUpdates) -> list[tuple[int, str, LowRank]]:
    """Return the updates of an encoder with the number of their block and the name of their projection."""
    return [(int(number), which, of[which]) for number, of in updates.items() for which in PROJECTIONS]  # type: ignore[index]


def peft_name(tower: str, number: int, which: str, letter: str) -> str:
    """Return PEFT's name of a matrix.

    Args:
        tower: "visual" or "text".
        number: of the block, from 1.
        which: "q", "k" or "v".
        letter: "A" or "B".
    """
    place = f"{TOWERS[tower]}.encoder.layers.{number - 1}.self_attn.{which}_proj"
    return f"base_model.model.{place}.lora_{letter}.weight"


def read_peft(folder: str | os.PathLike[str], towers: Mapping[str, LowRankUpdates]) -> dict[str, Tensor]:
    """Read an adapter for CLIPModel as a state dict of low-rank updates: `visual.1.q.A`, ...

    A projection that the adapter leaves alone gets an update of zero. B takes up the quotient of the scales, so that
    the updates are the adapter's.

    Args:
        folder: what PEFT's `save_pretrained` has written.
        towers: the updates that the state is for, "visual" and "text".

    Raises:
        FileNotFoundError: the folder lacks one of the files.
        ValueError: a file cannot be read, or the adapter does what low-rank updates of queries, keys and values do not.
    """
    config, state = read_config(Path(folder)), read_weights(Path(folder))
    rank, root = config["r"], config["r"] ** 0.5
    scale = config["lora_alpha"] / (root if config.get("use_rslora") else config["r"])
    found: dict[str, Tensor] = {}
    for tower, updates in towers.items():
        for number, which, module in parts(updates):
            names = {letter: peft_name(tower, number, which, letter) for letter in "AB"}
            if len(module.A) != rank:
                raise ValueError(
                    f"Expected TRAINER.CLIPLORA.RANK to be {rank}, as in {folder}, but got {len(module.A)}"
                )
            a, b = (state.pop(names[letter], None) for letter in "AB")
            if (a is None) != (b is None):
                raise ValueError(f"Expected {folder} to have both {names['A']} and {names['B']} but it has one of them")
            if a is None or b is None:
                a, b = module.A.detach(), torch.zeros_like(module.B)
            for letter, value, own in (("A", a, module.A), ("B", b, module.B)):
                if value.shape != own.shape:
                    raise ValueError(
                        f"Expected {names[letter]} to have shape {tuple(own.shape)} but got {tuple(value.shape)}"
                    )
                factor = scale / module.scale if letter == "B" else 1.0
                same = math.isclose(factor, 1, rel_tol=1e-12)
                found[f"{tower}.{number}.{which}.{letter}"] = value.float() if same else value.float() * factor
    if state:
        known = "q_proj, k_proj and v_proj of the encoders' blocks"
        raise ValueError(f"Expected an adapter of {known} alone but got {sorted(state)[0]} and {len(state) - 1} others")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of an adapter that low-rank updates can take over.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or asks for something else.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"Expected the folder {folder} to hold {CONFIG} but it does not")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected {path} to be JSON but got: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"Expected an adapter of PEFT's type LORA but got {kind!r}: {path}")
    for name, wanted in (("r", int), ("lora_alpha", (int, float))):
        value = config.get(name)
        if not isinstance(value, wanted) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ValueError(f"Expected {name} to be a number above 0 but got {value!r}: {path}")
    wrong = {name: value for name, value in config.items() if value and name not in READ | IDLE}
    if config.get("bias", "none") != "none":
        wrong["bias"] = config["bias"]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        wrong["init_lora_weights"] = config["init_lora_weights"]  # some kinds change the weights beside
    if wrong:
        name, value = next(iter(wrong.items()))
        raise ValueError(f"Expected plain low-rank updates, so no {name}, but got {name} {value!r}: {path}")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file cannot be read, or holds other things than updates of queries, keys and values.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"Expected the folder {folder} to hold {WEIGHTS} but it does not")
    try:
        state = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"Expected {path} to be a safetensors file but got: {error}") from error
    other = [name for name in state if not NAME.fullmatch(name)]
    if other:
        raise ValueError(
            f"Expected updates of q_proj, k_proj and v_proj of a CLIPModel's blocks alone but got {other[0]}: {path}"
        )
    return state

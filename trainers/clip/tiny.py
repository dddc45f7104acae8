"""The bundled tiny CLIP's files: a JSON with the architecture and how the model was made, and half-precision weights.

Only the vocabulary rows that pretraining used are stored: ``token_embedding.weight`` is replaced by
``token_embedding.rows`` [V, width] and ``token_embedding.ids`` [V]. A row that is not stored is filled with the mean
of those that are, so an unseen word is read as a word without meaning.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..files import write_bytes, write_text

ASSETS = Path(__file__).parent / "assets"
STEM = "tiny_clip"
ROWS, IDS, TABLE = "token_embedding.rows", "token_embedding.ids", "token_embedding.weight"
START_OF_TEXT, END_OF_TEXT = 49406, 49407


def tiny_files(weights: str | os.PathLike[str] | None = None) -> tuple[Path, Path]:
    """Find the (.json, .safetensors) pair of files of a tiny CLIP.

    Args:
        weights: None for the bundled one, else a folder that holds ``tiny_clip.json`` and ``tiny_clip.safetensors``,
            or a ``.safetensors`` file with its ``.json`` of the same name beside it.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
    """
    if weights is None:
        tensors = ASSETS / f"{STEM}.safetensors"
    else:
        path = Path(weights).expanduser()
        tensors = path / f"{STEM}.safetensors" if path.is_dir() else path
    record = tensors.with_suffix(".json")
    for path in (record, tensors):
        if not path.is_file():
            whose = "its bundled" if weights is None else "the tiny CLIP's"
            raise FileNotFoundError(f"Expected {whose} file {path} to exist, but it is missing (backbone tiny)")
    return record, tensors


def read_record(record: Path) -> dict[str, Any]:
    """Read the JSON of a tiny CLIP: ``{"arch": ..., "record": ...}``.

    Raises:
        ValueError: the file cannot be read, is no such JSON, or its "arch" is incomplete.
    """
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(data["arch"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"Expected {record} to be a JSON object with an 'arch' but got {error!r}") from error
    if missing:
        raise ValueError(f"Expected 'arch' in {record} to have {', '.join(sorted(missing))} but it lacks them")
    return data


def expand_vocabulary(state: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Undo the vocabulary cut of a stored state dict, and return all tensors in fp32.

    Raises:
        ValueError: the stored rows or their ids are missing, or the ids do not fit the rows or the vocabulary.
    """
    if ROWS not in state or IDS not in state:
        raise ValueError(f"Expected a tiny CLIP's weights to have {ROWS} and {IDS} but got neither or one of them")
    out = {key: value.float() for key, value in state.items() if key not in (ROWS, IDS)}
    rows, ids = state[ROWS].float(), state[IDS].long()
    if (
        ids.ndim != 1
        or len(ids) != len(rows)
        or len(ids) == 0
        or not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size
    ):
        raise ValueError(
            f"Expected {IDS} to be one id in 0..{vocab_size - 1} per stored row ({len(rows)}) "
            f"but got shape {tuple(ids.shape)}"
        )
    table = rows.mean(dim=0).repeat(vocab_size, 1)  # [vocab_size, width]
    table[ids] = rows
    out[TABLE] = table
    return out


def describe_arch(model: Any) -> dict[str, Any]:
    """Read the constructor arguments of a ViT-based ``open_clip.CLIP`` off its modules."""
    visual, text_block, vision_block = (
        model.visual,
        model.transformer.resblocks[0],
        model.visual.transformer.resblocks[0],
    )
    width, text_width = int(visual.conv1.out_channels), int(model.transformer.width)
    return {
        "embed_dim": int(model.text_projection.shape[1]),
        "quick_gelu": isinstance(text_block.mlp.gelu, open_clip.transformer.QuickGELU),
        "vision_cfg": {
            "layers": len(visual.transformer.resblocks),
            "width": width,
            "head_width": width // int(vision_block.attn.num_heads),
            "mlp_ratio": vision_block.mlp.c_fc.out_features / width,
            "patch_size": int(visual.patch_size[0]),
            "image_size": int(visual.image_size[0]),
        },
        "text_cfg": {
            "context_length": int(model.context_length),
            "vocab_size": int(model.vocab_size),
            "width": text_width,
            "heads": int(text_block.attn.num_heads),
            "layers": len(model.transformer.resblocks),
            "mlp_ratio": text_block.mlp.c_fc.out_features / text_width,
        },
    }


def save_tiny(
    clip_model: Any, used_ids: Iterable[int], record: Mapping[str, Any], folder: str | os.PathLike[str]
) -> Path:
    """Write ``tiny_clip.safetensors`` and ``tiny_clip.json`` into a folder, each complete or not at all.

    Args:
        clip_model: an ``open_clip.CLIP`` with a vision transformer, in any dtype on any device.
        used_ids: token ids whose embedding rows are kept; start- and end-of-text are kept always.
        record: anything worth keeping (command, seed, measured accuracy) that JSON can hold.
        folder: created if missing.

    Returns:
        Path of the ``.safetensors`` file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu() for key, value in clip_model.state_dict().items()}
    table = state.pop(TABLE)
    ids = torch.tensor(sorted({int(i) for i in used_ids} | {START_OF_TEXT, END_OF_TEXT}))
    if not 0 <= int(ids[0]) <= int(ids[-1]) < len(table):
        raise ValueError(f"Expected used_ids to be in 0..{len(table) - 1} but got {int(ids[0])}..{int(ids[-1])}")
    state[ROWS] = table[ids]
    state = {key: value.half().contiguous() for key, value in state.items()}
    state[IDS] = ids.to(torch.int32)
    text = json.dumps({"arch": describe_arch(clip_model), "record": dict(record)}, indent=2) + "\n"
    tensors = folder / f"{STEM}.safetensors"
    write_bytes(tensors, safetensors_bytes(state))
    write_text(tensors.with_suffix(".json"), text)
    return tensors

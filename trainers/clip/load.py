"""From a backbone's name to a frozen CLIP."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from .backbones import Backbone, resolve_backbone, weights_hint
from .checkpoint import build_open_clip, read_checkpoint
from .model import CLIP, PRECISIONS
from .tiny import expand_vocabulary, read_record, tiny_files

logger = logging.getLogger(__name__)


def load_clip(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
) -> CLIP:
    """Build a CLIP with its weights: frozen, in eval mode.

    Args:
        name: one of ``BACKBONES`` (OpenAI's quick-GELU models and the bundled "tiny") or
            ``open_clip:<model>/<pretrained tag>``.
        weights: a local checkpoint of that architecture (OpenAI's archive or state dict, open_clip's .pt or
            .safetensors); for "tiny" the folder or .safetensors file of another tiny CLIP; None or "" = the backbone's
            own weights, from the cache or downloaded once.
        precision: "fp32", "fp16", "bf16" (weights cast) or "amp" (fp32 weights; the engine autocasts).
        device: where the model goes.

    Raises:
        ValueError: unknown name or precision; a checkpoint that is damaged, is of another architecture, holds anything
            but tensors, or has the wrong checksum.
        FileNotFoundError: the weights are not here and cannot be fetched; says what to fetch by hand.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"Expected precision to be one of {', '.join(PRECISIONS)} but got {precision!r}")
    backbone = resolve_backbone(name)
    if name == "tiny":
        record, path = tiny_files(weights or None)
        arch = read_record(record)["arch"]
        state = expand_vocabulary(read_checkpoint(path), arch["text_cfg"]["vocab_size"])
    else:
        path = Path(weights).expanduser() if weights else _obtain(backbone)
        arch, state = backbone.arch, read_checkpoint(path)
    model = build_open_clip(arch, state, f"{name} in {path}")
    clip = CLIP(model, name, precision, backbone.pixel_mean, backbone.pixel_std)
    logger.info("CLIP %s from %s (%s)", name, path, precision)
    return clip.to(device)


def _obtain(backbone: Backbone) -> Path:
    """The backbone's own weights: from any cache, else from the first source that delivers."""
    for source in backbone.sources:
        if source.cached() is not None:
            try:
                return source.fetch()  # verifies the checksum
            except OSError as error:
                logger.warning("%s", error)
    failures = []
    for source in backbone.sources:
        try:
            return source.fetch()
        except OSError as error:
            failures.append(str(error).strip().split("\n")[0])
    raise FileNotFoundError(
        f"Expected to fetch the weights of {backbone.name} but got: {'; '.join(failures) or 'no place that has them'}. "
        + (weights_hint(backbone) if backbone.sources else "Set MODEL.BACKBONE.WEIGHTS to a local file.")
    )

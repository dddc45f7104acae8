"""Config keys that belong to CLIP itself, whichever trainer uses it."""

from __future__ import annotations

from typing import Any


def add_clip_config(cfg: Any) -> None:
    """Add CLIP's own keys to a yacs config, leaving those that exist as they are.

    Args:
        cfg: an unfrozen yacs node that has the sections ``MODEL.BACKBONE`` and ``DATASET``.
    """
    if "WEIGHTS" not in cfg.MODEL.BACKBONE:
        # Path of a local checkpoint for MODEL.BACKBONE.NAME (.pt or .safetensors); "" = the backbone's own weights,
        # from the cache folder or downloaded once. For "tiny": folder or .safetensors file of another tiny CLIP.
        cfg.MODEL.BACKBONE.WEIGHTS = ""
    if "TEMPLATE" not in cfg.DATASET:
        # Zero-shot prompt with exactly one "{}" for the class name; "" = the dataset's own (see templates.py).
        cfg.DATASET.TEMPLATE = ""

"""Config keys that belong to CLIP itself, whichever trainer uses it."""

from __future__ import annotations

from typing import Any


def add_clip_config(cfg: Any) -> None:
    """Add CLIP's own keys to a yacs config, leaving those that exist as they are.

    Args:
        cfg: an unfrozen yacs node that has the sections ``MODEL.BACKBONE`` and ``DATASET``; FEATURE_CACHE is new.
    """
    if "WEIGHTS" not in cfg.MODEL.BACKBONE:
        # Path of a local checkpoint for MODEL.BACKBONE.NAME (.pt or .safetensors); "" = the backbone's own weights,
        # from the cache folder or downloaded once. For "tiny": folder or .safetensors file of another tiny CLIP.
        cfg.MODEL.BACKBONE.WEIGHTS = ""
    if "TEMPLATE" not in cfg.DATASET:
        # Zero-shot prompt with exactly one "{}" for the class name, or a list of such prompts, whose mean counts;
        # "" = the dataset's own, and on ImageNet those of the method's source (see templates.py).
        cfg.DATASET.TEMPLATE = ""
    if "DESCRIPTIONS" not in cfg.DATASET:
        # JSON file {class name: [sentence, ...]}, as CuPL's: zero-shot CLIP, and every method that starts from its
        # texts, takes the mean of a class's sentences in place of templates; "" = templates (see descriptions.py).
        cfg.DATASET.DESCRIPTIONS = ""
    declare = getattr(cfg, "declare_text_or_list", None)
    if callable(declare):  # elsewhere a list is written as a text: "['a photo of a {}.', 'art of the {}.']"
        declare("DATASET.TEMPLATE")
    if "FEATURE_CACHE" not in cfg:
        node = type(cfg)()
        node.USE = True  # keep features of frozen backbones on disk, and take them from there; the numbers are the same
        node.DIR = ""  # folder; "" = features in $DLR_CLIP_CACHE, else in $XDG_CACHE_HOME/dlr_clip or ~/.cache/dlr_clip
        node.LIMIT = 4.0  # GiB of all entries, 0 or more; those not used for longest go first
        cfg.FEATURE_CACHE = node

"""Configuration keys that belong to the datasets."""

from __future__ import annotations

from yacs.config import CfgNode


def extend_cfg(cfg: CfgNode) -> None:
    """Add the datasets' own keys to the toolbox's defaults; keys that exist already keep their value."""
    if "SUBSAMPLE_CLASSES" not in cfg.DATASET:
        # all | base | new: which half of the classes takes part (base = the first ceil(C/2) labels). Source: CoOp.
        cfg.DATASET.SUBSAMPLE_CLASSES = "all"

"""Configuration keys that belong to the datasets."""

from __future__ import annotations

from yacs.config import CfgNode


def extend_cfg(cfg: CfgNode) -> None:
    """Add the datasets' own keys to the toolbox's defaults; keys that exist already keep their value."""
    if "SUBSAMPLE_CLASSES" not in cfg.DATASET:
        # all | base | new: which half of the classes takes part (base = the first ceil(C/2) labels). Source: CoOp.
        cfg.DATASET.SUBSAMPLE_CLASSES = "all"
    if "VAL" not in cfg.DATASET:
        # own | coop: where validation images come from in ImageNet, whose official validation set is the test set.
        # own: min(shots, 4) per class from the training images that were not picked; coop: the test set, as in CoOp,
        # and then nothing may be selected on it. Other datasets have validation images of their own either way.
        cfg.DATASET.VAL = "own"

"""Configure the commands on IMO's adapters."""

from __future__ import annotations

from typing import Any

from trainers.app.configuration import default_cfg
from trainers.clip import CLIP


def config(clip: CLIP, name: str, root: str, shots: int = -1, seed: int = 1) -> Any:
    """Return the configuration under which a dataset is read for a model."""
    cfg = default_cfg()
    cfg.merge_from_list(["DATASET.NAME", name, "DATASET.ROOT", root, "DATASET.NUM_SHOTS", shots, "SEED", seed])
    cfg.merge_from_list(["INPUT.SIZE", (clip.image_size,) * 2, "INPUT.INTERPOLATION", "bicubic", "VERBOSE", False])
    cfg.merge_from_list(["INPUT.PIXEL_MEAN", list(clip.pixel_mean), "INPUT.PIXEL_STD", list(clip.pixel_std)])
    cfg.merge_from_list(["INPUT.TRANSFORMS", ("normalize",)])
    return cfg

"""The methods. Importing this package registers every trainer; `extend_cfg` adds their configuration keys.

The same code is `trainers` in the checkout and `dlr_clip` once installed, hence relative imports everywhere below.
With an upstream Dassl, in one's own train.py:

    import dlr_clip
    cfg = get_cfg_default()
    dlr_clip.extend_cfg(cfg)

A new method is one file or folder here with a class under `@TRAINER_REGISTRY.register()` and one import line below;
its keys come from the class's static `add_config(cfg)`.
"""

from __future__ import annotations

from typing import Any

from dassl.engine import TRAINER_REGISTRY

from . import (
    clap,
    cliplora,
    cocoop,
    coop,
    cross_modal,
    dlrclip,
    em_dirichlet,
    feature_adapter,
    imo,
    linear_probe,
    mma,
    taskres,
    tip_adapter,
    tip_adapter_pp,
    zsclip,
)
from .clip import add_clip_config

__all__ = [
    "clap",
    "cliplora",
    "cocoop",
    "coop",
    "cross_modal",
    "dlrclip",
    "em_dirichlet",
    "extend_cfg",
    "feature_adapter",
    "imo",
    "linear_probe",
    "mma",
    "taskres",
    "tip_adapter",
    "tip_adapter_pp",
    "zsclip",
]


def extend_cfg(cfg: Any) -> None:
    """Adds the keys of CLIP and of every registered trainer to `cfg`, in place; keys that exist are left alone."""
    add_clip_config(cfg)
    for name in TRAINER_REGISTRY.registered_names():
        add_config = getattr(TRAINER_REGISTRY.get(name), "add_config", None)
        if callable(add_config):
            add_config(cfg)

"""Configuration: the tree of defaults, YAML files that inherit by ``_BASE_``, and overrides."""

from __future__ import annotations

from .compare import INDIFFERENT, REPORTS, Difference, differing, plain_config
from .defaults import build_defaults
from .node import CfgNode, read_yaml

cfg_default = build_defaults()  # upstream's name for the tree that get_cfg_default copies

__all__ = [
    "INDIFFERENT",
    "REPORTS",
    "CfgNode",
    "cfg_default",
    "Difference",
    "clean_cfg",
    "differing",
    "get_cfg_default",
    "plain_config",
    "read_yaml",
]


def get_cfg_default() -> CfgNode:
    """Return a new tree of all default values, which the caller may change."""
    return build_defaults()


def clean_cfg(cfg: CfgNode, trainer: str) -> None:
    """Remove the nodes of all trainers but ``trainer`` from ``cfg.TRAINER``, so that a printed config is short."""
    from dassl.engine import TRAINER_REGISTRY  # which imports this module

    known = trainer in TRAINER_REGISTRY.registered_names()
    own = TRAINER_REGISTRY.get(trainer).config_node() if known else trainer.upper()
    for key in list(cfg.TRAINER.keys()):
        if key not in ("NAME", own):
            cfg.TRAINER.pop(key)

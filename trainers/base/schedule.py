"""Build optimizers and learning-rate schedules that count steps."""

from __future__ import annotations

from typing import Any

from torch import nn

from dassl.optim import build_optimizer


def build_optimizer_with_eps(model: nn.Module, optim_cfg: Any, eps: float) -> Any:
    """Build the optimizer that `optim_cfg` describes, and set its epsilon where its kind has one."""
    optim = build_optimizer(model, optim_cfg)
    for group in optim.param_groups:
        if "eps" in group:
            group["eps"] = eps
    return optim


def count_steps(optim_cfg: Any, num_batches: int) -> Any:
    """Return a copy of the node OPTIM in which every number of epochs has become a number of steps."""
    node = optim_cfg.clone()
    node.defrost()
    node.MAX_EPOCH = optim_cfg.MAX_EPOCH * num_batches
    if optim_cfg.get("LR_UNIT", "epoch") == "epoch":  # otherwise the keys below count steps already
        node.WARMUP_EPOCH = optim_cfg.WARMUP_EPOCH * num_batches
        if isinstance(optim_cfg.STEPSIZE, (list, tuple)):
            node.STEPSIZE = type(optim_cfg.STEPSIZE)(size * num_batches for size in optim_cfg.STEPSIZE)
    node.freeze()
    return node

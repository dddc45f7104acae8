"""Build optimizers by name."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn, optim
from torch.optim import Optimizer

from dassl.config import CfgNode
from dassl.upstream_names import upstream_name
from dassl.utils import InputError, check_availability

logger = logging.getLogger(__name__)

__all__ = ["AVAI_OPTIMS", "build_optimizer"]

AVAI_OPTIMS = ["adam", "amsgrad", "sgd", "rmsprop", "radam", "adamw"]


def build_optimizer(
    model: nn.Module | Iterable[Any],
    optim_cfg: CfgNode,
    param_groups: Iterable[Any] | None = None,
) -> Optimizer:
    """Build the optimizer that ``optim_cfg`` (``cfg.OPTIM``) describes.

    Args:
        model: a module, all of whose parameters are given to the optimizer, or parameters or parameter groups.
        optim_cfg: the OPTIM node.
        param_groups: use these groups instead of the model's parameters; STAGED_LR is then ignored.

    Raises:
        InputError: unknown NAME, no parameters, or a name in NEW_LAYERS that the model does not have.
    """
    name = optim_cfg.NAME
    check_availability(name, AVAI_OPTIMS)
    if param_groups is not None:
        if optim_cfg.STAGED_LR:
            logger.warning("OPTIM.STAGED_LR is ignored: the parameter groups are given")
        params = list(param_groups)
    elif optim_cfg.STAGED_LR:
        params = _staged_groups(model, optim_cfg)
    elif isinstance(model, nn.Module):
        params = list(model.parameters())
    else:
        params = list(model)
    if not params:
        raise InputError("Expected parameters to optimize but got none")

    common = {"lr": optim_cfg.LR, "weight_decay": optim_cfg.WEIGHT_DECAY}
    if name == "sgd":
        return optim.SGD(
            params,
            momentum=optim_cfg.MOMENTUM,
            dampening=optim_cfg.SGD_DAMPNING,
            nesterov=optim_cfg.SGD_NESTEROV,
            **common,
        )
    if name == "rmsprop":
        return optim.RMSprop(params, momentum=optim_cfg.MOMENTUM, alpha=optim_cfg.RMSPROP_ALPHA, **common)
    adam = {
        "betas": (optim_cfg.ADAM_BETA1, optim_cfg.ADAM_BETA2),
        "eps": optim_cfg.get("ADAM_EPS", 1e-8),  # a config written for upstream has no such key
        **common,
    }
    if name == "adamw":
        return optim.AdamW(params, **adam)
    if name == "radam":
        # The published RAdam (Liu et al. 2020) decays the weights directly, not through the gradient.
        return optim.RAdam(params, decoupled_weight_decay=True, **adam)
    return optim.Adam(params, amsgrad=name == "amsgrad", **adam)


def _staged_groups(model: nn.Module | Iterable[Any], optim_cfg: CfgNode) -> list[dict[str, Any]]:
    """Return two groups: the children named in NEW_LAYERS (rate LR), and all other parameters (LR * BASE_LR_MULT).

    Only direct children of the module count.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"Expected a module with OPTIM.STAGED_LR but got {type(model).__name__}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _staged_groups(model.module, optim_cfg)
    wanted = optim_cfg.NEW_LAYERS
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    children = [name for name, _ in model.named_children()]
    for name in wanted:
        check_availability(name, children)
    if not wanted:
        logger.warning("OPTIM.NEW_LAYERS is empty: all layers learn at LR x %s", optim_cfg.BASE_LR_MULT)
    new = [p for name, child in model.named_children() if name in wanted for p in child.parameters()]
    known = {id(p) for p in new}
    base = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": base, "lr": optim_cfg.LR * optim_cfg.BASE_LR_MULT}, {"params": new}]
    return [group for group in groups if group["params"]]


def __getattr__(name: str) -> Any:  # names that upstream's module offers, too
    return upstream_name(__name__, name)

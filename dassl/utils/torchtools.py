"""Count, freeze and initialize a module's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dassl.upstream_names import upstream_name

from .checkpoints import load_checkpoint, load_pretrained_weights, resume_from_checkpoint, save_checkpoint
from .errors import InputError

# Upstream has the functions for checkpoints in this module, too.
__all__ = [
    "count_num_param",
    "init_network_weights",
    "load_checkpoint",
    "load_pretrained_weights",
    "open_all_layers",
    "open_specified_layers",
    "resume_from_checkpoint",
    "save_checkpoint",
]


def count_num_param(model: nn.Module | None = None, params: Any = None) -> int:
    """Count the values in all parameters of ``model``, or in ``params`` (parameters, or optimizer groups of them)."""
    if model is not None:
        return sum(parameter.numel() for parameter in model.parameters())
    if params is not None:
        return sum(
            sum(p.numel() for p in item["params"]) if isinstance(item, Mapping) else item.numel() for item in params
        )
    raise ValueError("Expected a model or its parameters but got neither")


def open_all_layers(model: nn.Module) -> None:
    """Make every parameter trainable and put the model into training mode."""
    model.train()
    model.requires_grad_(True)


def open_specified_layers(model: nn.Module, open_layers: str | Sequence[str]) -> None:
    """Train the named direct children only; freeze the others and put them into evaluation mode.

    Raises:
        InputError: the model has no child of such a name.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    wanted = [open_layers] if isinstance(open_layers, str) else list(open_layers)
    children = dict(model.named_children())
    for name in wanted:
        if name not in children:
            raise InputError(f'Expected a layer among {", ".join(children)} but got "{name}"')
    for name, child in children.items():
        child.train(name in wanted)
        child.requires_grad_(name in wanted)


_INITIALIZERS = {
    "normal": lambda weight, gain: nn.init.normal_(weight, 0.0, gain),
    "xavier": lambda weight, gain: nn.init.xavier_normal_(weight, gain=gain),
    "kaiming": lambda weight, gain: nn.init.kaiming_normal_(weight, a=0, mode="fan_in"),
    "orthogonal": lambda weight, gain: nn.init.orthogonal_(weight, gain=gain),
}
_WEIGHTED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def init_network_weights(model: nn.Module, init_type: str = "normal", gain: float = 0.02) -> None:
    """Initialize linear and convolution weights; set the weights of norms to 1 and all biases to 0.

    Args:
        model: changed in place.
        init_type: normal (``gain`` = standard deviation), xavier, kaiming (fan-in; no gain) or orthogonal.
        gain: scale of the values.
    """
    if init_type not in _INITIALIZERS:
        raise InputError(f'Expected init_type to be one of {", ".join(_INITIALIZERS)} but got "{init_type}"')
    for module in model.modules():
        if isinstance(module, _WEIGHTED):
            _INITIALIZERS[init_type](module.weight, gain)
        elif isinstance(module, _NORMS) and module.weight is not None:
            nn.init.ones_(module.weight)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def set_bn_to_eval(m: nn.Module) -> None:
    """Put a batch normalization layer into eval mode, for ``model.apply``; its scale and shift still learn."""
    if isinstance(m, nn.modules.batchnorm._BatchNorm):
        m.eval()


def adjust_learning_rate(
    optimizer: Optimizer,
    base_lr: float,
    epoch: int,
    stepsize: int = 20,
    gamma: float = 0.1,
    linear_decay: bool = False,
    final_lr: float = 0,
    max_epoch: int = 100,
) -> None:
    """Set all rates for an epoch: base_lr * gamma^(epoch // stepsize), or on the line from base_lr to final_lr.

    With ``linear_decay`` the line counts; it reaches ``final_lr`` at ``max_epoch``.
    """
    if linear_decay:
        rate = base_lr + (final_lr - base_lr) * epoch / max_epoch
    else:
        rate = base_lr * gamma ** (epoch // stepsize)
    for group in optimizer.param_groups:
        group["lr"] = rate


def __getattr__(name: str) -> Any:  # names that upstream's module offers, too
    return upstream_name(__name__, name)

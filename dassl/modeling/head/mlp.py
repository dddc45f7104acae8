"""The head called "mlp"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from dassl.utils import InputError, check_availability

from .build import HEAD_REGISTRY

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU}


class MLP(nn.Module):
    """Linear layers, each followed by optional batch norm, an activation and optional dropout.

    Args:
        in_features: width of the input.
        hidden_layers: widths of the layers, at least one; the last is ``out_features``.
        activation: relu, leaky_relu or elu.
        bn: batch norm after each linear layer.
        dropout: probability in [0, 1).
    """

    def __init__(
        self,
        in_features: int = 2048,
        hidden_layers: int | Sequence[int] = (),
        activation: str = "relu",
        bn: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [hidden_layers] if isinstance(hidden_layers, int) else list(hidden_layers)
        if not widths:
            raise InputError("Expected HEAD.HIDDEN_LAYERS to have at least one width but got none")
        check_availability(activation, list(_ACTIVATIONS))
        layers: list[nn.Module] = []
        for width in widths:
            layers.append(nn.Linear(in_features, width))
            if bn:
                layers.append(nn.BatchNorm1d(width))
            layers.append(_ACTIVATIONS[activation]())
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            in_features = width
        self.layers = nn.Sequential(*layers)
        self.out_features = in_features

    def forward(self, features: Any) -> Any:
        """Return outputs [B, out_features] for features [B, in_features]."""
        return self.layers(features)


@HEAD_REGISTRY.register()
def mlp(**kwargs: Any) -> MLP:
    """Build the head called "mlp"."""
    return MLP(**kwargs)

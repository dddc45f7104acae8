"""A layer that reverses gradients (Ganin and Lempitsky, 2015)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd import Function


class _Reverse(Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, scaling: float) -> Tensor:
        ctx.scaling = scaling
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -ctx.scaling * gradients[0], None


class ReverseGrad(nn.Module):
    """Identity whose gradient is multiplied by -scaling."""

    def forward(self, x: Tensor, scaling: float = 1.0) -> Tensor:
        """Return ``x`` unchanged; its gradient will be multiplied by -scaling."""
        return _Reverse.apply(x, scaling)

"""The optimizers that upstream keeps in this module, from torch."""

from __future__ import annotations

from typing import Any

from torch.optim import AdamW
from torch.optim import RAdam as _RAdam

__all__ = ["AdamW", "PlainRAdam", "RAdam"]


class RAdam(_RAdam):
    """RAdam as published (Liu et al., 2020): it decays the weights directly, not through the gradient."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0, degenerated_to_sgd: bool = True) -> None:  # fmt: skip
        """Take torch's arguments.

        ``degenerated_to_sgd`` changes nothing: torch's RAdam takes plain steps where upstream's does.
        """
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled_weight_decay=True)


class PlainRAdam(RAdam):
    """RAdam under upstream's second name for it."""

"""Add low-rank updates to the projections of blocks (LoRA).

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2022. Legend: D width of a block, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clip import BlockEdit

PROJECTIONS = ("q", "k", "v")


class LowRank(nn.Module):
    """The low-rank update scale * B A dropout(x) for x, D -> r -> D; it is zero at the start.

    Args:
        width: D.
        rank: r.
        alpha: `scale` is alpha / sqrt(r), as in the published code.
        dropout: share of x's entries that are dropped in training.
    """

    def __init__(self, width: int, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, width))
        self.B = nn.Parameter(torch.zeros(width, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale, self.dropout = alpha / math.sqrt(rank), dropout

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the update [..., D] for x [..., D], in fp32 whatever the backbone's precision.

        Args:
            x: [..., D].
            generator: draws what is dropped; None: torch's own.
        """
        with torch.autocast(device_type=x.device.type, enabled=False):
            x, scale = x.float(), self.scale
            if self.training and self.dropout > 0:
                dropped = torch.rand(x.shape, generator=generator, device=x.device) < self.dropout
                x, scale = x.masked_fill(dropped, 0.0), scale / (1 - self.dropout)
            return scale * F.linear(F.linear(x, self.A), self.B)


class LowRankUpdates(BlockEdit, nn.ModuleDict):
    """Update the queries, keys and values of blocks, with one LowRank for each projection of each block.

    Attributes:
        generator: draws what is dropped; None: torch's own.

    Args:
        widths: width D of each block, by its number.
        rank, alpha, dropout: see LowRank.
    """

    def __init__(self, widths: Mapping[int, int], rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        for i, width in sorted(widths.items()):
            self[str(i)] = nn.ModuleDict({which: LowRank(width, rank, alpha, dropout) for which in PROJECTIONS})
        self.first_block = min(widths)
        self.generator: torch.Generator | None = None

    def project(self, number: int, which: str, x: Tensor) -> Tensor:
        """Return what is added to an attention projection's output; see BlockEdit."""
        return self[str(number)][which](x, self.generator)  # type: ignore[index]  # a ModuleDict in a ModuleDict

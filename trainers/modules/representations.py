"""Tokens of a space of their own, mapped by layer into both of CLIP's encoders (MMRL, MMRL++).

The names in the modules' states are the published ones. Legend: n tokens, R width of their space, D width of an
encoder, J layers that get tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .deep_prompts import drawn


class MappedRepresentations(nn.Module):
    """Tokens `compound_rep_tokens` [n, R] and a linear map of each layer into each encoder, which all start alike.

    Args:
        n: number of tokens.
        dim: R.
        image, text: D of the encoders.
        layers: J.
    """

    def __init__(self, n: int, dim: int, image: int, text: int, layers: int) -> None:
        super().__init__()
        self.compound_rep_tokens = drawn(n, dim)
        to_image, to_text = nn.Linear(dim, image), nn.Linear(dim, text)
        self.compound_rep_tokens_r2vproj = nn.ModuleList([copy.deepcopy(to_image) for _ in range(layers)])
        self.compound_rep_tokens_r2tproj = nn.ModuleList([copy.deepcopy(to_text) for _ in range(layers)])

    def image(self) -> list[Tensor]:
        """Return the tokens [n, D] of each layer of the image encoder."""
        return mapped(self.compound_rep_tokens, self.compound_rep_tokens_r2vproj)

    def text(self) -> list[Tensor]:
        """Return the tokens [n, D] of each layer of the text encoder."""
        return mapped(self.compound_rep_tokens, self.compound_rep_tokens_r2tproj)


def mapped(tokens: Tensor, maps: Sequence[nn.Module] | nn.ModuleList) -> list[Tensor]:
    """Return what each map makes of the tokens [n, R], in fp32 even under autocast."""
    with torch.autocast(device_type=tokens.device.type, enabled=False):
        return [one(tokens) for one in maps]


class LowRankPart(nn.Module):
    """A layer's update of a shared matrix, A B of rank r, and its own bias; A B is zero at the start."""

    def __init__(self, shared: nn.Linear, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(shared.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(rank, shared.in_features))
        self.bias = nn.Parameter(shared.bias.detach().clone())

    def forward(self, tokens: Tensor, shared: Tensor) -> Tensor:
        """Return tokens [n, D] for tokens [n, R] and the shared matrix [D, R]."""
        return F.linear(tokens, shared + self.A @ self.B, self.bias)


class SharedMap(nn.Module):
    """Linear maps x (W + A_j B_j)^T + b_j of J layers, with one matrix W: `weight`, `srra.<j>.A`, `.B`, `.bias`.

    Args:
        dim: R.
        width: D.
        layers: J.
        rank: of A_j B_j.
    """

    def __init__(self, dim: int, width: int, layers: int, rank: int) -> None:
        super().__init__()
        start = nn.Linear(dim, width)
        self.weight = nn.Parameter(start.weight.detach().clone())
        self.srra = nn.ModuleList([LowRankPart(start, rank) for _ in range(layers)])

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Return the tokens [n, D] of each layer for tokens [n, R], in fp32 even under autocast."""
        with torch.autocast(device_type=tokens.device.type, enabled=False):
            return [part(tokens, self.weight) for part in self.srra]


class SharedRepresentations(nn.Module):
    """Tokens `compound_rep_tokens` [n, R] and a SharedMap into each encoder, `srra_r2vproj` and `srra_r2tproj`.

    Args:
        n, dim, image, text, layers: see MappedRepresentations.
        rank: see SharedMap.
    """

    def __init__(self, n: int, dim: int, image: int, text: int, layers: int, rank: int) -> None:
        super().__init__()
        self.compound_rep_tokens = drawn(n, dim)
        self.srra_r2vproj = SharedMap(dim, image, layers, rank)
        self.srra_r2tproj = SharedMap(dim, text, layers, rank)

    def image(self) -> list[Tensor]:
        """Return the tokens [n, D] of each layer of the image encoder."""
        return self.srra_r2vproj(self.compound_rep_tokens)

    def text(self) -> list[Tensor]:
        """Return the tokens [n, D] of each layer of the text encoder."""
        return self.srra_r2tproj(self.compound_rep_tokens)

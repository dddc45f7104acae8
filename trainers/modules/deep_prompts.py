"""Tokens that are learnt in front of several blocks of CLIP's encoders.

In front of a block, the tokens that a method inserted are replaced by new ones; behind the last such block they go on
like any other token. The names in the modules' states are the published ones (MaPLe, IVLP, PromptSRC).

Legend: B sequences, L tokens, n tokens that are learnt, D width of an encoder, J blocks with tokens of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..clip import BlockEdit

DEVIATION = 0.02  # of the normal draws that tokens start as


def drawn(*shape: int) -> nn.Parameter:
    """Return a parameter of normal draws with deviation 0.02."""
    return nn.Parameter(DEVIATION * torch.randn(*shape))


class FrontTokens(BlockEdit):
    """Put tokens behind the first one of each sequence: behind the class token, or behind the start of text.

    All sequences get the same ones, so that prompts go on sharing their beginning.

    Args:
        tokens: number of a block -> what stands there when the block is entered, [n, D].
        inserted: whether the first of these blocks inserts its tokens; else it replaces n tokens that are there.
        share: tokens that replace others are `share` times new ones plus 1 - `share` times those that were there.
    """

    def __init__(self, tokens: Mapping[int, Tensor], inserted: bool = False, share: float = 1.0) -> None:
        self.first_block = min(tokens)
        self._tokens, self._inserted, self._share = dict(tokens), inserted, share
        # Inserted tokens become shared ones, so that later blocks change shared tokens alone, too.
        self.leading = 1 if inserted else 1 + len(self._tokens[self.first_block])

    def tokens(self, number: int, x: Tensor) -> Tensor:
        """Insert or replace a block's tokens behind the first one, in x [B, L, D]; see BlockEdit."""
        if number not in self._tokens:
            return x
        new = self._tokens[number].to(x.dtype).expand(x.shape[0], -1, -1)
        gone = 0 if self._inserted and number == self.first_block else new.shape[1]
        if gone and self._share < 1:
            new = self._share * new + (1 - self._share) * x[:, 1 : 1 + gone]
        return torch.cat([x[:, :1], new, x[:, 1 + gone :]], dim=1)


class BackTokens(BlockEdit):
    """Put tokens behind the last one of each sequence of the image encoder.

    Args:
        tokens: number of a block -> what stands there when the block is entered, [n, D]. The first of these blocks has
            them appended, the others have the last n tokens replaced.
    """

    def __init__(self, tokens: Mapping[int, Tensor]) -> None:
        self.first_block = min(tokens)
        self._tokens = dict(tokens)

    def tokens(self, number: int, x: Tensor) -> Tensor:
        """Insert or replace a block's tokens at the end of x [B, L, D]; see BlockEdit."""
        if number not in self._tokens:
            return x
        new = self._tokens[number].to(x.dtype).expand(x.shape[0], -1, -1)
        stays = x.shape[1] - (0 if number == self.first_block else new.shape[1])
        return torch.cat([x[:, :stays], new], dim=1)


class LayerTokens(nn.Module):
    """The tokens of one block, `VPT_shallow` [n, D]."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.VPT_shallow = drawn(n, width)


class IndependentTokens(nn.Module):
    """Tokens of an encoder's blocks, each learnt by itself: `VPT`, `transformer.resblocks.<block - 1>.VPT_shallow`.

    Args:
        n: tokens in front of a block.
        width: D.
        blocks: numbers of the blocks, from 1. Those of block 1 are `VPT`, which goes through ln_pre.
    """

    def __init__(self, n: int, width: int, blocks: Iterable[int]) -> None:
        super().__init__()
        blocks = list(blocks)
        if 1 in blocks:
            self.VPT = drawn(n, width)
        layers = nn.ModuleDict({str(number - 1): LayerTokens(n, width) for number in blocks if number > 1})
        self.transformer = nn.ModuleDict({"resblocks": layers})

    def by_block(self) -> dict[int, Tensor]:
        """Return the tokens [n, D] of each block, by its number."""
        layers = self.transformer["resblocks"].items()  # type: ignore[operator]  # a ModuleDict in a ModuleDict
        deeper = {int(place) + 1: layer.VPT_shallow for place, layer in layers}
        return {1: self.VPT, **deeper} if hasattr(self, "VPT") else deeper


class Context(nn.Module):
    """The tokens of the text encoder's first block, `ctx` [n, D]."""

    def __init__(self, context: Tensor) -> None:
        super().__init__()
        self.ctx = nn.Parameter(context)


class MappedTokens(Context):
    """Text tokens of J blocks, and for each block a linear map that makes its image tokens of them.

    Names: `ctx`, `proj` of the first block; `compound_prompts_text`, `compound_prompt_projections` of the others. The
    maps of the others start alike, as published.

    Args:
        context: what the text tokens of the first block start as, [n, D].
        width: of the image encoder.
        depth: J.
    """

    def __init__(self, context: Tensor, width: int, depth: int) -> None:
        super().__init__(context)
        n, text_width = context.shape
        self.proj = nn.Linear(text_width, width)
        self.compound_prompts_text = nn.ParameterList([drawn(n, text_width) for _ in range(depth - 1)])
        one = nn.Linear(text_width, width)
        self.compound_prompt_projections = nn.ModuleList([copy.deepcopy(one) for _ in range(depth - 1)])

    def deeper_text(self) -> dict[int, Tensor]:
        """Return the text tokens of each block behind the first, by its number."""
        return dict(enumerate(self.compound_prompts_text, start=2))

    def image(self) -> dict[int, Tensor]:
        """Return the image tokens of each block, by its number, in fp32 even under autocast."""
        maps = [self.proj, *self.compound_prompt_projections]
        with torch.autocast(device_type=self.ctx.device.type, enabled=False):
            return {
                i: m(t) for i, (m, t) in enumerate(zip(maps, [self.ctx, *self.compound_prompts_text], strict=True), 1)
            }

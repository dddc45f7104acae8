"""CLIP's image encoder as blocks that can be run from anywhere to anywhere, with or without adapters.

Legend: B images, N tokens (class token first), D width, C channels, E joint embedding.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import (
    Adapter,
    Projection,
    add_adapter,
    finish_block,
    layer_norm,
    mix,
    project_kv,
    project_q,
    project_qkv,
    recompute,
)


class VisionTower(nn.Module):
    """An image encoder cut into blocks numbered from 1.

    Attributes:
        kind: "vit" or "resnet".
        depth: number of blocks (ResNet: residual blocks of all four stages, in order).
        widths: block number -> width of what an adapter of that block sees and returns.
        adaptable: block numbers that take an adapter by default (ViT: all; ResNet: those of the last two stages).
        image_size: side length of the square input in pixels.
        embed_dim: E.
    """

    kind: str
    depth: int
    widths: dict[int, int]
    adaptable: tuple[int, ...]
    image_size: int
    embed_dim: int

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Compute dtype of the blocks."""

    @abstractmethod
    def _stem(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> what enters block 1."""

    @abstractmethod
    def _block(self, number: int, hidden: Tensor, adapter: Adapter | None) -> Tensor:
        """Run one block."""

    @abstractmethod
    def enter(self, hidden: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Run block ``number`` without its adapter: what the adapter of that block sees, and the block's output.

        The adapter's result is only added to the output, so branches that part at this block share all the rest of it:
        ``suffix(add_adapter(output, adapter, number, seen), number + 1, adapter)`` goes on with one,
        ``suffix(output, number + 1)`` without.

        Args:
            hidden: as for ``suffix``.
            number: 1..depth. A ViT's last block is computed for the class token alone, [B, 1, D].
        """

    @abstractmethod
    def suffix(
        self,
        hidden: Tensor,
        start: int,
        adapter: Adapter | None = None,
        projection: Projection | None = None,
        after: Adapter | None = None,
        checkpointing: bool = False,
        beside: Adapter | None = None,
    ) -> Tensor:
        """Run blocks ``start``..depth and the head on what enters block ``start``.

        Args:
            hidden: from ``prefix(images, start - 1)``: ViT [B, N, D], ResNet [B, C, H, W].
            start: 1..depth + 1 (depth + 1: the head alone).
            adapter: see ``blocks.Adapter``. A ViT's last block calls it for the class token alone, [B, 1, D].
            projection: see ``blocks.Projection``; for a ViT only.
            after: as ``adapter``, handed each block's output h, [B, N, D] (ResNet: [B, C, H, W]): h + after(h).
            checkpointing: keep only what enters each block, and compute it again in the backward pass.
            beside: as ``after``, but handed what enters a ViT block's MLP before ln_2, x': x' + mlp(ln_2(x')) +
                beside(x'). A ResNet's blocks have no MLP: there it is the same as ``after``.

        Returns:
            Image features [B, E], not normalised.
        """

    def prefix(self, images: Tensor, stop: int) -> Tensor:
        """Run the stem and blocks 1..``stop``: what enters block ``stop + 1``.

        Args:
            images: [B, 3, S, S], normalised with CLIP's mean and deviation.
            stop: 0..depth (0: after the stem).

        Returns:
            ViT: [B, N, D]; ResNet: [B, C, H, W].
        """
        if not 0 <= stop <= self.depth:
            raise ValueError(f"Expected stop to be in 0..{self.depth} but got {stop}")
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"Expected images to have shape [B, {expected}] but got {tuple(images.shape)}")
        hidden = self._stem(images.to(self.dtype))
        for number in range(1, stop + 1):
            hidden = self._block(number, hidden, None)
        return hidden

    def _check_start(self, start: int, last: int) -> None:
        if not 1 <= start <= last:
            raise ValueError(f"Expected start to be in 1..{last} but got {start}")

    def forward(self, images: Tensor) -> Tensor:
        """Image features [B, E], not normalised."""
        return self.suffix(self.prefix(images, 0), 1)


class ViTTower(VisionTower):
    """Vision transformer read out at its class token."""

    kind = "vit"

    def __init__(self, visual: Any) -> None:
        """Args: visual: open_clip's VisionTransformer with plain blocks and class-token pooling."""
        super().__init__()
        pooled_plainly = visual.attn_pool is None and visual.pool_type == "tok" and not visual.final_ln_after_pool
        if not pooled_plainly or not isinstance(visual.transformer.resblocks[0].attn, nn.MultiheadAttention):
            raise ValueError("Expected a vision transformer with plain attention blocks, read out at its class token")
        self.visual = visual
        self.depth = len(visual.transformer.resblocks)
        self.width = int(visual.conv1.out_channels)
        self.widths = {i: self.width for i in range(1, self.depth + 1)}
        self.adaptable = tuple(self.widths)
        self.image_size = int(visual.image_size[0])
        self.embed_dim = int(visual.proj.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def _stem(self, images: Tensor) -> Tensor:
        patches = self.visual.conv1(images).flatten(2).transpose(1, 2)  # [B, D, S/p, S/p] -> [B, N - 1, D]
        cls = self.visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([cls, patches], dim=1) + self.visual.positional_embedding.to(patches.dtype)
        return layer_norm(self.visual.ln_pre, x)

    def _plain(
        self,
        number: int,
        hidden: Tensor,
        projection: Projection | None,
        read_out: bool,
        beside: Adapter | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Block ``number`` without its adapter -> (ln_1 of the tokens entering it, its output), [B, N, D] each.

        With ``read_out`` for the class token alone, [B, 1, D]: only keys and values need every token.
        """
        block = self.visual.transformer.resblocks[number - 1]
        normed = layer_norm(block.ln_1, hidden)
        if not read_out:
            attended = mix(block.attn, *project_qkv(block.attn, normed, number, projection))
        else:
            q = project_q(block.attn, normed[:, :1], number, projection)
            attended = mix(block.attn, q, *project_kv(block.attn, normed, number, projection))
            hidden, normed = hidden[:, :1], normed[:, :1]
        return normed, finish_block(block, hidden, attended, beside, number)

    def _block(
        self,
        number: int,
        hidden: Tensor,
        adapter: Adapter | None,
        projection: Projection | None = None,
        after: Adapter | None = None,
        read_out: bool = False,
        beside: Adapter | None = None,
    ) -> Tensor:
        normed, out = self._plain(number, hidden, projection, read_out, beside)
        out = add_adapter(out, adapter, number, normed)
        return add_adapter(out, after, number, out)

    def enter(self, hidden: Tensor, number: int) -> tuple[Tensor, Tensor]:
        self._check_start(number, self.depth)
        return self._plain(number, hidden, None, number == self.depth)

    def suffix(
        self,
        hidden: Tensor,
        start: int,
        adapter: Adapter | None = None,
        projection: Projection | None = None,
        after: Adapter | None = None,
        checkpointing: bool = False,
        beside: Adapter | None = None,
    ) -> Tensor:
        self._check_start(start, self.depth + 1)
        for number in range(start, self.depth + 1):
            arguments = (number, hidden, adapter, projection, after, number == self.depth, beside)
            hidden = recompute(self._block, *arguments) if checkpointing else self._block(*arguments)
        return layer_norm(self.visual.ln_post, hidden[:, 0]) @ self.visual.proj


class ResNetTower(VisionTower):
    """CLIP's modified ResNet: three-convolution stem, four stages, attention pooling."""

    kind = "resnet"

    def __init__(self, visual: Any) -> None:
        """Args: visual: open_clip's ModifiedResNet."""
        super().__init__()
        # Channels last: RN50 on a CPU takes a fifth less time so.
        self.visual = visual.to(memory_format=torch.channels_last)
        stages = [list(stage) for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4)]
        self._blocks = [block for stage in stages for block in stage]
        self.depth = len(self._blocks)
        self.widths = {i: int(block.conv3.out_channels) for i, block in enumerate(self._blocks, start=1)}
        self.adaptable = tuple(range(len(stages[0]) + len(stages[1]) + 1, self.depth + 1))
        self.image_size = int(visual.image_size)
        self.embed_dim = int(visual.attnpool.c_proj.out_features)

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def _stem(self, images: Tensor) -> Tensor:
        return self.visual.stem(images.contiguous(memory_format=torch.channels_last))

    def _block(self, number: int, hidden: Tensor, adapter: Adapter | None, after: Adapter | None = None) -> Tensor:
        out = self._blocks[number - 1](hidden)
        out = add_adapter(out, adapter, number, out)
        return add_adapter(out, after, number, out)

    def _pool(self, hidden: Tensor) -> Tensor:
        """Attention pooling for its one query that is read, the mean over positions: [B, C, H, W] -> [B, E]."""
        pool = self.visual.attnpool
        x = hidden.flatten(2).transpose(1, 2)  # [B, HW, C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # [B, 1 + HW, C]
        x = x + pool.positional_embedding.to(x.dtype)
        q, k, v = (
            y.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)  # [B, heads, tokens, C / heads]
            for y in (pool.q_proj(x[:, :1]), pool.k_proj(x), pool.v_proj(x))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return pool.c_proj(out.transpose(1, 2).flatten(2)).squeeze(1)

    def enter(self, hidden: Tensor, number: int) -> tuple[Tensor, Tensor]:
        self._check_start(number, self.depth)
        out = self._blocks[number - 1](hidden)
        return out, out

    def suffix(
        self,
        hidden: Tensor,
        start: int,
        adapter: Adapter | None = None,
        projection: Projection | None = None,
        after: Adapter | None = None,
        checkpointing: bool = False,
        beside: Adapter | None = None,
    ) -> Tensor:
        self._check_start(start, self.depth + 1)
        if projection is not None:
            raise ValueError("Expected no projection for a ResNet, whose blocks have no queries, keys and values")
        if after is not None and beside is not None:
            raise ValueError("Expected one of after and beside for a ResNet, where they are the same, but got both")
        for number in range(start, self.depth + 1):
            arguments = (number, hidden, adapter, after if beside is None else beside)
            hidden = recompute(self._block, *arguments) if checkpointing else self._block(*arguments)
        return self._pool(hidden)


def build_vision_tower(visual: nn.Module) -> VisionTower:
    """The tower for open_clip's image encoder; ValueError for an encoder that is neither CLIP's ViT nor its ResNet."""
    import open_clip.modified_resnet
    import open_clip.transformer

    if isinstance(visual, open_clip.transformer.VisionTransformer):
        return ViTTower(visual)
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        return ResNetTower(visual)
    raise ValueError(f"Expected the image encoder to be CLIP's ViT or ResNet but got {type(visual).__name__}")

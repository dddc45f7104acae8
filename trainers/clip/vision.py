"""CLIP's image encoder as blocks that can be run from anywhere to anywhere, with or without edits (edits.py).

Legend: B images, N tokens (class token first), D width, C channels, E joint embedding, P width before the projection.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import finish_block, mix, project_kv, project_q, project_qkv, recompute
from .edits import INSIDE, BlockEdit, Edits, layer_norm, layer_norms, norms_of_blocks


class VisionTower(nn.Module):
    """An image encoder cut into blocks numbered from 1.

    Attributes:
        kind: "vit", "resnet" or "opaque" (a tower whose blocks cannot be run; see opaque.py).
        depth: number of blocks (ResNet: residual blocks of all four stages, in order).
        widths: block number -> width of what an edit of that block sees and returns.
        adaptable: block numbers that are adapted by default (ViT: all; ResNet: those of the last two stages).
        image_size: side length of the square input in pixels.
        embed_dim: E.
        pooled_dim: P, the width of what the last matrix projects to E (ViT: D; ResNet: C of the last stage).
        form: what else than weights and our own code decides features, for the key of the cache; "": nothing.
    """

    kind: str
    depth: int
    widths: dict[int, int]
    adaptable: tuple[int, ...]
    image_size: int
    embed_dim: int
    pooled_dim: int
    form: str = ""
    _inside: tuple[str, ...] = INSIDE  # methods of edits that change what ``enter`` computes

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Compute dtype of the blocks."""

    @abstractmethod
    def _stem(self, images: Tensor, edits: Edits) -> Tensor:
        """Return what enters block 1 for images [B, 3, S, S]."""

    @abstractmethod
    def _plain(self, number: int, hidden: Tensor, edits: Edits, read: int) -> tuple[Tensor, Tensor]:
        """Run one block with the edits inside the block, and return what ``parallel`` sees and the block's output.

        The output lacks what ``_close`` adds. A ViT's block is computed for the first ``read`` tokens alone,
        [B, read, D]; 0: for all.
        """

    @abstractmethod
    def _pool(self, hidden: Tensor, edits: Edits) -> Tensor:
        """Return what the last matrix projects, [B, P], for what leaves the last block."""

    @abstractmethod
    def _project(self, pooled: Tensor) -> Tensor:
        """Return image features [B, E] for what ``_pool`` returned."""

    @abstractmethod
    def mean_patch(self, hidden: Tensor) -> Tensor:
        """Return the mean over an image's patches, [B, D] or [B, C], of what leaves a block (see ``through``).

        Raises:
            ValueError: the tower's blocks cannot be run.
        """

    @abstractmethod
    def projection(self) -> tuple[Tensor, Tensor | None]:
        """Return the matrix [P, E] that gives image features, and what is added to them, [E]; None: nothing."""

    def check_edits(self, edits: Sequence[BlockEdit], method: str = "") -> Edits:
        """Refuse edits that this tower cannot make, and return the edits sorted by the methods they override.

        The check comes before anything is computed.

        Args:
            edits: as for ``suffix``.
            method: who wants the edits, for the error message; "": the message says "these edits".

        Raises:
            ValueError: no list of BlockEdits, or, for a ResNet, edits of tokens, projections or LayerNorms.
        """
        return Edits(edits)

    def norms(self) -> dict[tuple[int, str], nn.LayerNorm]:
        """Return the LayerNorms whose gain and bias an edit may replace, by the number and name it is asked with.

        A ResNet has none.
        """
        return {}

    def enter(self, hidden: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Run block ``number`` without edits, and return what ``parallel`` of that block sees and the block's output.

        What an edit makes beside or behind the block is only added to the output. So branches that part at this block
        share the rest of the block: ``suffix(join(output, edits, number, seen), number + 1, edits)`` goes on with
        edits, ``suffix(output, number + 1)`` without.

        Args:
            hidden: as for ``suffix``.
            number: 1..depth. A ViT's last block is computed for the class token alone, [B, 1, D].
        """
        self._check_start(number, self.depth)
        return self._plain(number, hidden, Edits(), int(number == self.depth))

    def join(self, out: Tensor, edits: Sequence[BlockEdit], number: int, seen: Tensor) -> Tensor:
        """Add to a block's output what edits compute beside and behind the block.

        Args:
            out, seen: the block's output and what ``parallel`` sees, both from ``enter``.
            edits: as for ``suffix``.
            number: number of the block.

        Raises:
            ValueError: an edit changes what is inside a block.
        """
        planned = self.check_edits(edits)
        planned.check_outside(self._inside)
        return self._close(out, planned, number, seen)

    def suffix(
        self, hidden: Tensor, start: int, edits: Sequence[BlockEdit] = (), checkpointing: bool = False
    ) -> Tensor:
        """Run blocks ``start``..depth and the head on what enters block ``start``.

        Args:
            hidden: from ``prefix(images, start - 1)``: ViT [B, N, D], ResNet [B, C, H, W].
            start: 1..depth + 1 (depth + 1: the head alone).
            edits: see edits.py. A ViT's last block asks for the class token alone, [B, 1, D], except for ``tokens`` and
                for what is added to keys and values. A ResNet takes ``parallel``, ``beside_mlp`` and ``after``.
            checkpointing: keep only what enters each block, and compute the rest again in the backward pass.

        Returns:
            Image features [B, E], not normalized.
        """
        return self._project(self._pooled_suffix(hidden, start, edits, checkpointing))

    def first_tokens(self, hidden: Tensor, start: int, edits: Sequence[BlockEdit], count: int) -> Tensor:
        """Run blocks ``start``..depth of a ViT, and return what leaves the last one of the first ``count`` tokens.

        Args:
            hidden, start, edits: as for ``suffix``.
            count: at least 1.

        Returns:
            [B, count, D], through ln_post. The first of them, times ``projection()``, is the image's feature.

        Raises:
            ValueError: the tower is a ResNet, which has no tokens.
        """
        raise ValueError("Expected a vision transformer but the image encoder is a ResNet, which has no tokens")

    def normalize_tokens(self, x: Tensor) -> Tensor:
        """Return tokens of an edit as block 1 takes them: a ViT's, [..., D], go through ln_pre."""
        return x

    def pooled(self, images: Tensor) -> Tensor:
        """Return features before the projection, [B, P], for images [B, 3, S, S].

        With ``projection`` W, b, the image features are these times W plus b.
        """
        return self._pooled_suffix(self.prefix(images, 0), 1)

    def _pooled_suffix(
        self, hidden: Tensor, start: int, edits: Sequence[BlockEdit] = (), checkpointing: bool = False
    ) -> Tensor:
        planned = self.check_edits(edits)
        return self._pool(self._run(hidden, start, self.depth, planned, 1, checkpointing), planned)

    def _run(
        self, hidden: Tensor, start: int, stop: int, edits: Edits, read: int = 0, checkpointing: bool = False
    ) -> Tensor:
        """Run blocks ``start``..``stop``, a ViT's last one for the first ``read`` tokens alone; 0: for all."""
        self._check_start(start, self.depth + 1)
        for number in range(start, stop + 1):
            arguments = (number, hidden, edits, read if number == self.depth else 0)
            hidden = recompute(self._block, *arguments) if checkpointing else self._block(*arguments)
        return hidden

    def prefix(self, images: Tensor, stop: int, edits: Sequence[BlockEdit] = ()) -> Tensor:
        """Run the stem and blocks 1..``stop``, and return what enters block ``stop + 1`` before its tokens are edited.

        Args:
            images: [B, 3, S, S], normalized with CLIP's mean and standard deviation.
            stop: 0..depth (0: after the stem).
            edits: as for ``suffix``. Only here can an edit's ``norm`` replace ln_pre.

        Returns:
            ViT: [B, N, D]; ResNet: [B, C, H, W].
        """
        if not 0 <= stop <= self.depth:
            raise ValueError(f"Expected stop to be in 0..{self.depth} but got {stop}")
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"Expected images to have shape [B, {expected}] but got {tuple(images.shape)}")
        planned = self.check_edits(edits)
        return self._run(self._stem(images.to(self.dtype), planned), 1, stop, planned)

    def through(self, hidden: Tensor, start: int, stop: int, edits: Sequence[BlockEdit] = ()) -> Tensor:
        """Run blocks ``start``..``stop`` (start - 1: none) for every token of ``prefix(images, start - 1)``."""
        if not start - 1 <= stop <= self.depth:
            raise ValueError(f"Expected stop to be in {start - 1}..{self.depth} but got {stop}")
        return self._run(hidden, start, stop, self.check_edits(edits))

    def _block(self, number: int, hidden: Tensor, edits: Edits, read: int) -> Tensor:
        seen, out = self._plain(number, hidden, edits, read)
        return self._close(out, edits, number, seen)

    def _close(self, out: Tensor, edits: Edits, number: int, seen: Tensor) -> Tensor:
        return edits.after(edits.parallel(out, number, seen), number)

    def _check_start(self, start: int, last: int) -> None:
        if not 1 <= start <= last:
            raise ValueError(f"Expected start to be in 1..{last} but got {start}")

    def forward(self, images: Tensor) -> Tensor:
        """Return image features [B, E], not normalized, for images [B, 3, S, S]."""
        return self.suffix(self.prefix(images, 0), 1)


class ViTTower(VisionTower):
    """Vision transformer read out at its class token."""

    kind = "vit"

    def __init__(self, visual: Any) -> None:
        """Take over a vision transformer.

        Args:
            visual: open_clip's VisionTransformer with plain blocks and class-token pooling.

        Raises:
            ValueError: the blocks or the pooling are others.
        """
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
        self.pooled_dim, self.embed_dim = (int(size) for size in visual.proj.shape)
        activation = type(visual.transformer.resblocks[0].mlp.gelu).__name__
        self.form = "" if activation == "QuickGELU" else activation  # no weight tells which one it is

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def norms(self) -> dict[tuple[int, str], nn.LayerNorm]:
        ends = {(0, "ln_pre"): self.visual.ln_pre, (self.depth + 1, "ln_post"): self.visual.ln_post}
        return layer_norms({**norms_of_blocks(self.visual.transformer.resblocks), **ends})

    def _stem(self, images: Tensor, edits: Edits) -> Tensor:
        patches = self.visual.conv1(images).flatten(2).transpose(1, 2)  # [B, D, S/p, S/p] -> [B, N - 1, D]
        # shape[0], not len(): a number of images that len() gave would be a constant of an exported graph.
        cls = self.visual.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = torch.cat([cls, patches], dim=1) + self.visual.positional_embedding.to(patches.dtype)
        return edits.normalize(self.visual.ln_pre, x, 0, "ln_pre")

    def _plain(self, number: int, hidden: Tensor, edits: Edits, read: int) -> tuple[Tensor, Tensor]:
        """Return ln_1 of the tokens that enter the block, and the block's output, [B, N, D] each (see VisionTower)."""
        block = self.visual.transformer.resblocks[number - 1]
        hidden = edits.enter(number, hidden)
        normed = edits.normalize(block.ln_1, hidden, number, "ln_1")
        if not read:
            attended = mix(block.attn, *project_qkv(block.attn, normed, number, edits))
        else:  # only keys and values need every token
            q = project_q(block.attn, normed[:, :read], number, edits)
            attended = mix(block.attn, q, *project_kv(block.attn, normed, number, edits))
            hidden, normed = hidden[:, :read], normed[:, :read]
        return normed, finish_block(block, hidden, attended, number, edits)

    def _pool(self, hidden: Tensor, edits: Edits) -> Tensor:
        return edits.normalize(self.visual.ln_post, hidden[:, 0], self.depth + 1, "ln_post")

    def first_tokens(self, hidden: Tensor, start: int, edits: Sequence[BlockEdit], count: int) -> Tensor:
        planned = self.check_edits(edits)
        hidden = self._run(hidden, start, self.depth, planned, count)
        return planned.normalize(self.visual.ln_post, hidden[:, :count], self.depth + 1, "ln_post")

    def normalize_tokens(self, x: Tensor) -> Tensor:
        return layer_norm(self.visual.ln_pre, x)

    def mean_patch(self, hidden: Tensor) -> Tensor:
        return hidden[:, 1:].mean(dim=1)

    def _project(self, pooled: Tensor) -> Tensor:
        return pooled @ self.visual.proj

    def projection(self) -> tuple[Tensor, Tensor | None]:
        return self.visual.proj, None


class ResNetTower(VisionTower):
    """CLIP's modified ResNet: three-convolution stem, four stages, attention pooling."""

    kind = "resnet"
    _inside = ()

    def __init__(self, visual: Any) -> None:
        """Take over a ResNet.

        Args:
            visual: open_clip's ModifiedResNet.
        """
        super().__init__()
        # With channels last, RN50 on a CPU takes a fifth less time.
        self.visual = visual.to(memory_format=torch.channels_last)
        stages = [list(stage) for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4)]
        self._blocks = [block for stage in stages for block in stage]
        self.depth = len(self._blocks)
        self.widths = {i: int(block.conv3.out_channels) for i, block in enumerate(self._blocks, start=1)}
        self.adaptable = tuple(range(len(stages[0]) + len(stages[1]) + 1, self.depth + 1))
        self.image_size = int(visual.image_size)
        self.pooled_dim = int(visual.attnpool.c_proj.in_features)
        self.embed_dim = int(visual.attnpool.c_proj.out_features)

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def check_edits(self, edits: Sequence[BlockEdit], method: str = "") -> Edits:
        planned = super().check_edits(edits, method)
        refused = planned.making(("tokens", "project", "norm"))
        if refused:
            raise ValueError(
                f"Expected a vision transformer for {method or 'these edits'} but the image encoder is a ResNet, whose "
                "blocks have no tokens, no queries, keys and values and no LayerNorms (they take the edits parallel, "
                f"beside_mlp and after): got {refused}"
            )
        return planned

    def _stem(self, images: Tensor, edits: Edits) -> Tensor:
        return self.visual.stem(images.contiguous(memory_format=torch.channels_last))

    def _plain(self, number: int, hidden: Tensor, edits: Edits, read: int) -> tuple[Tensor, Tensor]:
        out = self._blocks[number - 1](hidden)
        return out, out

    def _close(self, out: Tensor, edits: Edits, number: int, seen: Tensor) -> Tensor:
        out = edits.parallel(out, number, seen)
        return edits.after(edits.beside_mlp(out, number, out), number)

    def _pool(self, hidden: Tensor, edits: Edits) -> Tensor:
        """Pool the positions of ``hidden`` [B, C, H, W] by attention, and return features [B, C].

        Only one query is computed, the one that is read: the mean over positions.
        """
        pool = self.visual.attnpool
        x = hidden.flatten(2).transpose(1, 2)  # [B, HW, C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # [B, 1 + HW, C]
        x = x + pool.positional_embedding.to(x.dtype)
        q, k, v = (
            y.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)  # [B, heads, tokens, C / heads]
            for y in (pool.q_proj(x[:, :1]), pool.k_proj(x), pool.v_proj(x))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2).squeeze(1)

    def mean_patch(self, hidden: Tensor) -> Tensor:
        return hidden.mean(dim=(2, 3))

    def _project(self, pooled: Tensor) -> Tensor:
        return self.visual.attnpool.c_proj(pooled)

    def projection(self) -> tuple[Tensor, Tensor | None]:
        projection = self.visual.attnpool.c_proj
        return projection.weight.t(), projection.bias


def build_vision_tower(visual: nn.Module) -> VisionTower:
    """Build the tower for open_clip's image encoder.

    Raises:
        ValueError: the encoder is neither CLIP's ViT nor its ResNet.
    """
    import open_clip.modified_resnet
    import open_clip.transformer

    if isinstance(visual, open_clip.transformer.VisionTransformer):
        return ViTTower(visual)
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        return ResNetTower(visual)
    raise ValueError(f"Expected the image encoder to be CLIP's ViT or ResNet but got {type(visual).__name__}")

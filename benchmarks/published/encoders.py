"""CLIP's encoders as published methods run them, from the first block to the last, and what a method changes in them.

Legend: B images, C classes, N tokens, L = 77, D width of a block, E width of the joint embedding, n learnt tokens.
"""

from __future__ import annotations

import math
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.naive import _linear, _norm


class Plain:
    """The changes that a method makes to an encoder; here none."""

    def tokens(self, number: int, x: Tensor) -> Tensor:
        """Return what enters a block in the place of x [B, N, D]."""
        return x

    def project(self, number: int, which: str, normed: Tensor) -> Tensor | float:
        """Return what is added to queries, keys or values."""
        return 0.0

    def beside(self, number: int, normed: Tensor) -> Tensor | float:
        """Return what is added to a block's output."""
        return 0.0

    def norm(self, number: int, which: str, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        """Return what a block's LayerNorm, ln_1 or ln_2, makes of x."""
        return _norm(layer, x)


def run_block(block: Any, x: Tensor, mask: Tensor | None, number: int, more: Plain) -> Tensor:
    """Run a block for all its tokens."""
    x = more.tokens(number, x)
    normed, attn = more.norm(number, "ln_1", block.ln_1, x), block.attn
    q, k, v = F.linear(normed, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (y + more.project(number, which, normed) for which, y in (("q", q), ("k", k), ("v", v)))
    q, k, v = (y.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
    mask = None if mask is None else mask[: x.shape[1], : x.shape[1]]
    x = x + _linear(attn.out_proj, F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
    return x + block.mlp(more.norm(number, "ln_2", block.ln_2, x)) + more.beside(number, normed)


class Replaced(Plain):
    """Tokens that replace those behind the first (front) or the last ones, by block: [n, D], or [B, n, D] of each."""

    def __init__(self, new: dict[int, Tensor], front: bool) -> None:
        self.new, self.front = new, front

    def tokens(self, number: int, x: Tensor) -> Tensor:
        if number not in self.new:
            return x
        new = self.new[number].expand(len(x), -1, -1)
        if self.front:
            return torch.cat([x[:, :1], new, x[:, 1 + new.shape[1] :]], dim=1)
        return torch.cat([x[:, : -new.shape[1]], new], dim=1)


class Inserted(Plain):
    """Tokens [n, D] that are inserted behind the first one before a block, and replaced before later ones.

    Those that replace others are `share` times new ones plus 1 - `share` times the others.
    """

    def __init__(self, new: dict[int, Tensor], share: float = 1.0) -> None:
        self.new, self.share = new, share

    def tokens(self, number: int, x: Tensor) -> Tensor:
        if number not in self.new:
            return x
        new = self.new[number].expand(len(x), -1, -1)
        if number == min(self.new):
            return torch.cat([x[:, :1], new, x[:, 1:]], dim=1)
        old, rest = x[:, 1 : 1 + new.shape[1]], x[:, 1 + new.shape[1] :]
        return torch.cat([x[:, :1], self.share * new + (1 - self.share) * old, rest], dim=1)


class Published:
    """A method's step as published; a subclass says how it encodes and what it loses.

    Args:
        network: ours, whose parameters and constants are used.
        settings: the method's.
    """

    trainer = ""  # registered name of the trainer; "": the row's
    keys: tuple[Any, ...] = ()  # of the configuration beside the method's vit_b16.yaml, each with its value
    words = "a photo of a"  # what stands before the class names
    inserted = 0  # tokens that are inserted into the prompts

    def __init__(self, network: Any, settings: Any) -> None:
        clip = network.clip
        self.network, self.learner, self.settings, self.clip = network, network.learner, settings, clip
        self.visual, self.text, self.zeroshot = clip.visual.visual, clip.text, network.zeroshot
        prompts = [f"{self.words} {name}." for name in network.classnames]
        self.ids = open_clip.tokenize(prompts, context_length=clip.text.context_length).to(clip.device)
        length = self.ids.shape[1] + self.inserted
        self.mask = torch.full((length, length), -math.inf, device=clip.device).triu(1)

    # Encoders

    def encode_texts(self, more: Plain, context: Tensor | None = None) -> Tensor:
        """Return text features [C, E], not normalized; `context` [n, D] replaces the embeddings behind the start."""
        text, ids = self.text, self.ids
        x = text.token_embedding(ids)
        if context is not None:
            n = len(context)
            x = torch.cat([x[:, :1], context.expand(len(x), -1, -1), x[:, 1 + n :]], dim=1)
        x = x + text.positional_embedding
        for i, block in enumerate(text.transformer.resblocks, start=1):
            x = run_block(block, x, self.mask, i, more)
        read = ids.argmax(dim=-1) + x.shape[1] - ids.shape[1]
        return _norm(text.ln_final, x)[torch.arange(len(ids)), read] @ text.text_projection

    def image_tokens(self, images: Tensor, more: Plain, behind: Tensor | None = None) -> Tensor:
        """Return what leaves ln_post, [B, N, D]; `behind` [n, D] stands behind the patches, before ln_pre."""
        visual = self.visual
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
        if behind is not None:
            x = torch.cat([x, behind.expand(len(x), -1, -1)], dim=1)
        x = _norm(visual.ln_pre, x)
        for i, block in enumerate(visual.transformer.resblocks, start=1):
            x = run_block(block, x, None, i, more)
        return _norm(visual.ln_post, x)

    def image_features(self, images: Tensor, more: Plain, behind: Tensor | None = None) -> Tensor:
        """Return image features [B, E], not normalized."""
        return self.image_tokens(images, more, behind)[:, 0] @ self.visual.proj

    def encode_images(self, images: Tensor, more: Plain, behind: Tensor | None = None) -> Tensor:
        """Return image features [B, E], normalized."""
        return F.normalize(self.image_features(images, more, behind), dim=-1)

    @torch.no_grad()
    def frozen_images(self, images: Tensor) -> Tensor:
        """Return the frozen CLIP's image features [B, E], normalized."""
        return self.encode_images(images, Plain())

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return logits [B, C] of normalized features."""
        return self.clip.logit_scale * images @ texts.t()

    # A step

    @staticmethod
    def begin(trainer: Any) -> None:
        """Bring our trainer to the stage that the step belongs to; here the first one."""

    def inputs(self, images: Tensor) -> Any:
        """Return what a step takes, ours as well: here the images [B, 3, H, W]."""
        return images

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of images [B, E] and texts [C, E], normalized."""
        raise NotImplementedError

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a step, for its inputs; here the cross-entropy."""
        return F.cross_entropy(self.logits(*self.features(images)), labels)

    def backward(self, loss: Tensor) -> None:
        """Leave the gradients that the optimizer takes."""
        loss.backward()

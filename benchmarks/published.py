"""Training steps of methods beside DLR-CLIP as published: the oracle and the yardstick of ours.

Written from the methods' formulas over the parameters of our networks, and calling none of their code:
* every class's prompt goes through the whole text encoder at the full context length (77 tokens), in every step;
* every image goes through the whole image encoder, also where nothing in it is learnt, and a second time where the
  method compares with the frozen CLIP;
* every block computes every token.
What depends on the class list and the frozen CLIP alone (zero-shot classifiers) is encoded once per run, here too.
Attention is the fused kernel, and frozen parts have no graph, in both.

Legend: B images, C classes, N tokens, L = 77, D width of a block, E width of the joint embedding, n learnt tokens.
"""

from __future__ import annotations

import math
from typing import Any

import open_clip
import torch
from torch import Tensor
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


def run_block(block: Any, x: Tensor, mask: Tensor | None, number: int, more: Plain) -> Tensor:
    """Run a block for all its tokens."""
    x = more.tokens(number, x)
    normed, attn = _norm(block.ln_1, x), block.attn
    q, k, v = F.linear(normed, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (y + more.project(number, which, normed) for which, y in (("q", q), ("k", k), ("v", v)))
    q, k, v = (y.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
    mask = None if mask is None else mask[: x.shape[1], : x.shape[1]]
    x = x + _linear(attn.out_proj, F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
    return x + block.mlp(_norm(block.ln_2, x)) + more.beside(number, normed)


class Published:
    """A method's step as published; a subclass says how it encodes and what it loses.

    Args:
        network: ours, whose parameters and constants are used.
        settings: the method's.
    """

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

    def encode_images(self, images: Tensor, more: Plain, behind: Tensor | None = None) -> Tensor:
        """Return image features [B, E], normalized."""
        return F.normalize(self.image_tokens(images, more, behind)[:, 0] @ self.visual.proj, dim=-1)

    @torch.no_grad()
    def frozen_images(self, images: Tensor) -> Tensor:
        """Return the frozen CLIP's image features [B, E], normalized."""
        return self.encode_images(images, Plain())

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return logits [B, C] of normalized features."""
        return self.clip.logit_scale * images @ texts.t()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a step, for images [B, 3, H, W]."""
        raise NotImplementedError


class CoOp(Published):
    """Context vectors."""

    def __init__(self, network: Any, settings: Any) -> None:
        self.words = settings.ctx_init or " ".join(["X"] * settings.n_ctx)
        super().__init__(network, settings)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        texts = F.normalize(self.encode_texts(Plain(), self.learner.ctx), dim=-1)
        return self.encode_images(images, Plain()), texts

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(*self.features(images)), labels)


class KgCoOp(CoOp):
    """Context vectors, held near the texts of the template."""

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        features, texts = self.features(images)
        far = 1 - F.cosine_similarity(texts, self.zeroshot).mean()
        return F.cross_entropy(self.logits(features, texts), labels) + self.settings.w * far


class CoCoOp(CoOp):
    """Context vectors that a network shifts by the image."""

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        features, net = self.encode_images(images, Plain()), self.learner.meta_net
        shifts = _linear(net.linear2, F.relu(_linear(net.linear1, features)))
        texts = [F.normalize(self.encode_texts(Plain(), self.learner.ctx + shift), dim=-1) for shift in shifts]
        rows = [self.logits(f[None], t) for f, t in zip(features, texts, strict=True)]
        return F.cross_entropy(torch.cat(rows), labels)


class Replaced(Plain):
    """Tokens [n, D] that replace those behind the first (front) or the last ones, by block."""

    def __init__(self, new: dict[int, Tensor], front: bool) -> None:
        self.new, self.front = new, front

    def tokens(self, number: int, x: Tensor) -> Tensor:
        if number not in self.new:
            return x
        new = self.new[number].expand(len(x), -1, -1)
        if self.front:
            return torch.cat([x[:, :1], new, x[:, 1 + new.shape[1] :]], dim=1)
        return torch.cat([x[:, : -new.shape[1]], new], dim=1)


class MaPLe(Published):
    """Text tokens in front of blocks, and image tokens that are made of them."""

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        own = self.learner.prompt_learner
        deeper = list(own.compound_prompts_text)
        mapped = [_linear(m, t) for m, t in zip(own.compound_prompt_projections, deeper, strict=True)]
        text = Replaced(dict(enumerate(deeper, start=2)), front=True)
        image = Replaced(dict(enumerate(mapped, start=2)), front=False)
        texts = F.normalize(self.encode_texts(text, own.ctx), dim=-1)
        return self.encode_images(images, image, _linear(own.proj, own.ctx)), texts

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(*self.features(images)), labels)


class PromptSRC(Published):
    """Tokens in front of blocks of both encoders, held near the frozen CLIP."""

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        learner, settings, frozen_texts = self.learner, self.settings, self.network.frozen_texts
        text, image = (
            {int(i) + 1: layer.VPT_shallow for i, layer in part.transformer["resblocks"].items()}
            for part in (learner.text_encoder, learner.image_encoder)
        )
        texts = F.normalize(self.encode_texts(Replaced(text, True), learner.prompt_learner.ctx), dim=-1)
        features = self.encode_images(images, Replaced(image, False), learner.image_encoder.VPT)
        frozen = self.frozen_images(images)
        logits, wanted = self.logits(features, texts), self.logits(frozen, frozen_texts)
        p, q = F.log_softmax(wanted, dim=1), F.log_softmax(logits, dim=1)
        return (
            F.cross_entropy(logits, labels)
            + settings.text_loss_weight * (texts - frozen_texts).abs().mean()
            + settings.image_loss_weight * (features - frozen).abs().mean()
            + (p.exp() * (p - q)).mean()
        )


class Bottlenecks(Plain):
    """Adapters beside blocks, whose middle layers both encoders share."""

    def __init__(self, own: Any, shared: Any, factor: float) -> None:
        self.own, self.shared, self.factor = own, shared, factor

    def scaled(self, x: Tensor, factor: float) -> Tensor:
        y = x * 1.0
        if y.requires_grad:
            y.register_hook(lambda grad: grad * factor)
        return y

    def beside(self, number: int, normed: Tensor) -> Tensor | float:
        if str(number) not in self.own:
            return 0.0
        part = self.own[str(number)]
        y = F.relu(_linear(part.down, self.scaled(normed, self.factor)))
        y = part.scale * _linear(part.up, F.relu(_linear(self.shared[str(number)], y)))
        return self.scaled(y, 1 / self.factor)


class MMA(CoOp):
    """Adapters in both encoders."""

    def __init__(self, network: Any, settings: Any) -> None:
        self.words = settings.text_ctx_init
        Published.__init__(self, network, settings)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        cma = self.learner.cma
        image, text = (Bottlenecks(own, cma.shared, self.settings.adapter_scale) for own in (cma.visual, cma.text))
        return self.encode_images(images, image), F.normalize(self.encode_texts(text), dim=-1)


class Updates(Plain):
    """Low-rank updates of queries, keys and values."""

    def __init__(self, parts: Any) -> None:
        self.parts = parts

    def project(self, number: int, which: str, normed: Tensor) -> Tensor:
        part = self.parts[str(number)][which]
        x = F.dropout(normed, part.dropout, training=part.training)
        return part.scale * (x @ part.A.t() @ part.B.t())


class CLIPLoRA(MMA):
    """Low-rank updates of both encoders."""

    def __init__(self, network: Any, settings: Any) -> None:
        Published.__init__(self, network, settings)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        texts = F.normalize(self.encode_texts(Updates(self.learner.text)), dim=-1)
        return self.encode_images(images, Updates(self.learner.visual)), texts


class Inserted(Plain):
    """Tokens [n, D] that are inserted behind the first one before a block, and replaced before later ones."""

    def __init__(self, new: dict[int, Tensor]) -> None:
        self.new = new

    def tokens(self, number: int, x: Tensor) -> Tensor:
        if number not in self.new:
            return x
        new = self.new[number].expand(len(x), -1, -1)
        rest = x[:, 1 + (new.shape[1] if number > min(self.new) else 0) :]
        return torch.cat([x[:, :1], new, rest], dim=1)


class MMRL(Published):
    """Tokens of a space of their own in the later blocks of both encoders, and a second image feature."""

    def __init__(self, network: Any, settings: Any) -> None:
        self.inserted = settings.n_rep_tokens
        super().__init__(network, settings)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        own, settings, blocks = self.learner.representation_learner, self.settings, self.learner.blocks
        image, text = (
            {i: _linear(m, own.compound_rep_tokens) for i, m in zip(blocks, maps, strict=True)}
            for maps in (own.compound_rep_tokens_r2vproj, own.compound_rep_tokens_r2tproj)
        )
        texts = F.normalize(self.encode_texts(Inserted(text)), dim=-1)
        tokens = self.image_tokens(images, Inserted(image))
        first = F.normalize(tokens[:, 0] @ self.visual.proj, dim=-1)
        rest = tokens[:, 1 : 1 + settings.n_rep_tokens].mean(dim=1)
        second = F.normalize(rest @ self.learner.image_encoder.proj_rep, dim=-1)
        frozen = self.frozen_images(images)
        near = 2 - F.cosine_similarity(first, frozen).mean() - F.cosine_similarity(texts, self.zeroshot).mean()
        return (
            settings.alpha * F.cross_entropy(self.logits(first, texts), labels)
            + (1 - settings.alpha) * F.cross_entropy(self.logits(second, texts), labels)
            + settings.reg_weight * near
        )


METHODS: dict[str, type[Published]] = {
    kind.__name__: kind for kind in (CoOp, CoCoOp, KgCoOp, MaPLe, PromptSRC, MMA, CLIPLoRA, MMRL)
}

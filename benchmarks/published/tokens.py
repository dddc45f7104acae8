"""Steps of methods that learn tokens inside the encoders, as published. Legend: see encoders.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.naive import _linear
from benchmarks.published.encoders import Inserted, Plain, Published, Replaced


def deeper(part: Any) -> dict[int, Tensor]:
    """Return the tokens [n, D] of the blocks behind the first, by number, where each block has its own."""
    return {int(i) + 1: layer.VPT_shallow for i, layer in part.transformer["resblocks"].items()}


class MaPLe(Published):
    """Text tokens in front of blocks, and image tokens that are made of them."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of images [B, E] and texts [C, E], not normalized."""
        own = self.learner.prompt_learner
        later = list(own.compound_prompts_text)
        mapped = [_linear(m, t) for m, t in zip(own.compound_prompt_projections, later, strict=True)]
        text = Replaced(dict(enumerate(later, start=2)), front=True)
        image = Replaced(dict(enumerate(mapped, start=2)), front=False)
        return self.image_features(images, image, _linear(own.proj, own.ctx)), self.encode_texts(text, own.ctx)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, texts = self.encode(images)
        return F.normalize(features, dim=-1), F.normalize(texts, dim=-1)


class CoPrompt(MaPLe):
    """MaPLe's tokens and a bottleneck behind each encoder, held near the frozen CLIP on other views.

    The benchmark describes each class by one sentence, the template, so that the sentence drawn is always that one.
    """

    def inputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images.flip(-1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        def mixed(part: Any, x: Tensor, share: float) -> Tensor:
            y = F.relu(_linear(part.fc[2], F.relu(_linear(part.fc[0], x))))
            return share * y + (1 - share) * x

        (features, texts), learner, settings = super().encode(images), self.learner, self.settings
        features = mixed(learner.adapter_image, features, settings.image_share)
        return features, mixed(learner.adapter_text, texts, settings.text_share)

    def loss(self, images: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:  # type: ignore[override]  # two views
        features, texts = self.features(images[0])
        frozen = self.frozen_images(images[1])
        far = 2 - F.cosine_similarity(features, frozen).mean() - F.cosine_similarity(texts, self.zeroshot).mean()
        return F.cross_entropy(self.logits(features, texts), labels) + self.settings.w * far


class VPT(Published):
    """Tokens in front of blocks of the image encoder; the texts depend on the class list alone."""

    def __init__(self, network: Any, settings: Any) -> None:
        self.words = settings.ctx_init
        super().__init__(network, settings)
        with torch.no_grad():
            self.texts = F.normalize(self.encode_texts(Plain()), dim=-1)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        own = self.learner.image_encoder
        return self.encode_images(images, Replaced(deeper(own), front=False), own.VPT), self.texts


class IVLP(Published):
    """Tokens in front of blocks of both encoders."""

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        image, text = self.learner.image_encoder, self.learner.text_encoder
        texts = self.encode_texts(Replaced(deeper(text), front=True), self.learner.prompt_learner.ctx)
        features = self.encode_images(images, Replaced(deeper(image), front=False), image.VPT)
        return features, F.normalize(texts, dim=-1)


class PromptSRC(IVLP):
    """Tokens in front of blocks of both encoders, held near the frozen CLIP."""

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        settings, frozen_texts = self.settings, self.network.frozen_texts
        features, texts = self.features(images)
        frozen = self.frozen_images(images)
        logits, wanted = self.logits(features, texts), self.logits(frozen, frozen_texts)
        p, q = F.log_softmax(wanted, dim=1), F.log_softmax(logits, dim=1)
        return (
            F.cross_entropy(logits, labels)
            + settings.text_loss_weight * (texts - frozen_texts).abs().mean()
            + settings.image_loss_weight * (features - frozen).abs().mean()
            + (p.exp() * (p - q)).mean()
        )


class MMRL(Published):
    """Tokens of a space of their own in the later blocks of both encoders, and a second image feature."""

    share = 1.0  # of new tokens where they replace others

    def __init__(self, network: Any, settings: Any) -> None:
        self.inserted = settings.n_rep_tokens
        super().__init__(network, settings)

    def mapped(self, which: str) -> list[Tensor]:
        """Return the tokens [n, D] of each layer of an encoder: of images (v) or texts (t)."""
        own = self.learner.representation_learner
        return [_linear(m, own.compound_rep_tokens) for m in getattr(own, f"compound_rep_tokens_r2{which}proj")]

    def projection(self) -> Tensor:
        """Return the matrix [D, E] of the second image feature."""
        return self.learner.image_encoder.proj_rep

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        settings, blocks = self.settings, self.learner.blocks
        image, text = (Inserted(dict(zip(blocks, self.mapped(w), strict=True)), self.share) for w in ("v", "t"))
        texts = F.normalize(self.encode_texts(text), dim=-1)
        tokens = self.image_tokens(images, image)
        first = F.normalize(tokens[:, 0] @ self.visual.proj, dim=-1)
        rest = tokens[:, 1 : 1 + settings.n_rep_tokens].mean(dim=1)
        second = F.normalize(rest @ self.projection(), dim=-1)
        frozen = self.frozen_images(images)
        near = 2 - F.cosine_similarity(first, frozen).mean() - F.cosine_similarity(texts, self.zeroshot).mean()
        return (
            settings.alpha * F.cross_entropy(self.logits(first, texts), labels)
            + (1 - settings.alpha) * F.cross_entropy(self.logits(second, texts), labels)
            + settings.reg_weight * near
        )


class MMRLPP(MMRL):
    """MMRL whose maps share a matrix, whose tokens keep a part of the old ones, and whose projection is near CLIP's."""

    def __init__(self, network: Any, settings: Any) -> None:
        super().__init__(network, settings)
        self.share = settings.beta

    def mapped(self, which: str) -> list[Tensor]:
        own = self.learner.representation_learner
        maps = getattr(own, f"srra_r2{which}proj")
        return [F.linear(own.compound_rep_tokens, maps.weight + part.A @ part.B, part.bias) for part in maps.srra]

    def projection(self) -> Tensor:
        return self.visual.proj + self.learner.image_encoder.A @ self.learner.image_encoder.B

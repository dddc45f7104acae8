"""Steps of methods that learn words of the prompts, as published. Legend: see encoders.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.naive import _linear
from benchmarks.published.encoders import Plain, Published, Replaced


class CoOp(Published):
    """Context vectors."""

    def __init__(self, network: Any, settings: Any) -> None:
        self.words = " ".join(["X"] * len(network.learner.ctx))
        super().__init__(network, settings)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        texts = F.normalize(self.encode_texts(Plain(), self.learner.ctx), dim=-1)
        return self.encode_images(images, Plain()), texts


class CoOpDePT(CoOp):
    """CoOp with DePT's linear classifier of scaled and shifted features."""

    trainer = "CoOp"
    keys = ("TRAINER.COOP.DEPT.WEIGHT", 0.7, "DATALOADER.TRAIN_X.BATCH_SIZE", 4)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        head, share = self.learner.dept, self.settings.dept.weight
        texts, features = self.encode_texts(Plain(), self.learner.ctx), self.image_features(images, Plain())
        rows = texts[labels] * head.film_lp_text.scale + head.film_lp_text.bias
        rows = torch.cat([rows, features * head.film_lp_img.scale + head.film_lp_img.bias])
        linear = F.cross_entropy(_linear(head.linear_probe_proj, rows), labels.repeat(2))
        logits = self.logits(F.normalize(features, dim=-1), F.normalize(texts, dim=-1))
        return (1 - share) * F.cross_entropy(logits, labels) + share * linear


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


class ProGrad(CoOp):
    """Context vectors whose steps do not go against zero-shot CLIP, for which images are encoded a second time."""

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        logits, t = self.logits(*self.features(images)), self.settings.t
        wanted = F.softmax(self.logits(self.frozen_images(images), self.zeroshot) / t, dim=1)
        self.divergence = -t * t * (wanted * F.log_softmax(logits / t, dim=1)).sum(dim=1).mean()
        return F.cross_entropy(logits, labels)

    def backward(self, loss: Tensor) -> None:
        ctx = self.learner.ctx
        self.divergence.backward(retain_graph=True)
        general, ctx.grad = ctx.grad, None
        loss.backward()
        along = (ctx.grad * general).sum() / general.norm()
        if along < 0:
            ctx.grad = ctx.grad - self.settings.lambda_ * along * general / general.norm()


class TCP(CoOp):
    """Context vectors, in whose place a network puts tokens of each class before a block of the text encoder."""

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        learner, net = self.learner, self.learner.meta_net
        hidden = _linear(net.linear1, self.zeroshot)
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        inner = _linear(net.linear2, hidden).reshape(len(hidden), *learner.ctx.shape)
        texts = self.encode_texts(Replaced({learner.layer: inner}, front=True), learner.ctx)
        return self.encode_images(images, Plain()), F.normalize(texts, dim=-1)

    loss = KgCoOp.loss

"""Steps of methods that add to CLIP's weights, or learn some of them, as published. Legend: see encoders.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.naive import _linear
from benchmarks.published.encoders import Plain, Published


class Bottlenecks(Plain):
    """Adapters beside blocks, whose middle layers both encoders share."""

    def __init__(self, own: Any, shared: Any, factor: float) -> None:
        self.own, self.shared, self.factor = own, shared, factor

    def scaled(self, x: Tensor, factor: float) -> Tensor:
        """Return x, whose gradient is scaled."""
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


class MMA(Published):
    """Adapters in both encoders."""

    def __init__(self, network: Any, settings: Any) -> None:
        self.words = settings.text_ctx_init
        super().__init__(network, settings)

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


class CLIPLoRA(Published):
    """Low-rank updates of both encoders."""

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        texts = F.normalize(self.encode_texts(Updates(self.learner.text)), dim=-1)
        return self.encode_images(images, Updates(self.learner.visual)), texts


class Norms(Plain):
    """Gains and biases of their own for the LayerNorms of the blocks."""

    def __init__(self, parts: Any) -> None:
        self.parts = parts

    def norm(self, number: int, which: str, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        own = self.parts[str(number)][which]
        return F.layer_norm(x, layer.normalized_shape, own["weight"], own["bias"], layer.eps)


class FirstStage(Published):
    """2SFS's first stage: the LayerNorms of both encoders."""

    trainer = "TwoStageFS"

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        texts = F.normalize(self.encode_texts(Norms(self.learner.text)), dim=-1)
        return self.encode_images(images, Norms(self.learner.visual)), texts


class SecondStage(Published):
    """2SFS's second stage: a linear classifier of what the fixed encoder makes of the images."""

    trainer = "TwoStageFS"

    @staticmethod
    def begin(trainer: Any) -> None:
        trainer.network.begin_second()

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            features = self.encode_images(images, Norms(self.learner.visual))
        return features, F.normalize(self.learner.classifier, dim=-1)

"""CLIP-Adapter: a bottleneck on the frozen CLIP's image features, blended with these features.

Gao et al., CLIP-Adapter: Better Vision-Language Models with Feature Adapters, 2021.

    f* = normalize(a A_v(f) + (1 - a) f)    A_v(f) = relu(f W1v) W2v, in CLIP-Adapter's code relu(relu(f W1v) W2v)
    W* = normalize(b A_t(W) + (1 - b) W)    A_t(W) = relu(W W1t) W2t
    logits = s f* W*^T, trained by cross-entropy; a = 0 or b = 0 switches a side off (CLIP-Adapter: b = 0)

Legend: B images, C classes, E width of the joint embedding, s CLIP's temperature (1 / tau).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import FeatureLearner, FeatureTrainer, MethodConfig, kept_views, key
from .clip import CLIP

logger = logging.getLogger(__name__)


def blend(features: Tensor, down: Tensor, up: Tensor, ratio: float, final_relu: bool = False) -> Tensor:
    """Return normalize(ratio * relu(features down^T) up^T + (1 - ratio) * features).

    Args:
        features: [n, E]. down: [r, E]. up: [E, r].
        final_relu: whether a second ReLU follows `up`.
    """
    adapted = (features @ down.t()).relu() @ up.t()
    if final_relu:
        adapted = adapted.relu()
    return F.normalize(ratio * adapted + (1 - ratio) * features, dim=-1)


class AdapterLearner(FeatureLearner):
    """A bottleneck for image features, one for text features, or both; it works for any class list.

    Args:
        image_ratio: a in [0, 1]; 0: no adapter on the image side.
        text_ratio: b in [0, 1]; 0: no adapter on the text side.
        reduction: E over the width of the bottleneck.
        final_relu: whether a second ReLU follows the bottleneck. A loaded checkpoint keeps the form it was trained in.
    """

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        zeroshot: Tensor,
        *,
        image_ratio: float,
        text_ratio: float,
        reduction: int,
        final_relu: bool,
    ) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.facts["final_relu"] = final_relu
        width = max(1, clip.embed_dim // reduction)
        self.ratios = {"image": image_ratio, "text": text_ratio}
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for side, ratio in self.ratios.items():
            if ratio:
                self.down[side] = nn.Linear(clip.embed_dim, width, bias=False).weight
                self.up[side] = nn.Linear(width, clip.embed_dim, bias=False).weight

    def adopt(self, facts: Mapping[str, Any]) -> None:
        """Take over the form of a checkpoint; one that does not name its form was trained without the second ReLU."""
        form = bool(facts.get("final_relu", False))
        if form != self.facts["final_relu"]:
            logger.info("The checkpoint was trained with FINAL_RELU %s, which counts", form)
        self.facts["final_relu"] = form

    def adapt(self, features: Tensor, side: str) -> Tensor:
        """Return features [n, E] of the "image" or "text" side adapted and normalized; as they are without adapter."""
        if not self.ratios[side]:
            return features
        return blend(features, self.down[side], self.up[side], self.ratios[side], self.facts["final_relu"])

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E]."""
        return self.scale * self.adapt(features, "image") @ self.adapt(self.zeroshot, "text").t()


@dataclass(frozen=True)
class CLIPAdapterConfig(MethodConfig):
    """Settings of CLIP-Adapter."""

    views: int = kept_views(10)
    ratio: float = key(0.2, "a, share of the adapted image feature", above=0, high=1, source="0.2")
    reduction: int = key(4, "E over the bottleneck's width", low=1, source="4")
    final_relu: bool = key(True, "a second ReLU, after the bottleneck", source="in its code, not in the paper")


@TRAINER_REGISTRY.register()
class CLIPAdapter(FeatureTrainer):
    """A bottleneck on image features."""

    recipe = 2
    node_name = "CLIPADAPTER"
    paper = "Gao et al. 2021"
    learns = "a bottleneck on image features"
    config = CLIPAdapterConfig
    model_name = "adapter"
    main_head = "adapter"
    per_step = False  # as published

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the adapter on the image side."""
        settings = self.settings
        return AdapterLearner(
            clip,
            classnames,
            zeroshot,
            image_ratio=settings.ratio,
            text_ratio=0.0,
            reduction=settings.reduction,
            final_relu=settings.final_relu,
        )

"""PromptSRC: independent tokens in both encoders that are held near the frozen CLIP, and averaged over epochs.

Khattak et al., Self-regulating Prompts: Foundational Model Adaptation without Forgetting, 2023. With f, t the features
of images and classes, normalized, f', t' those of the frozen CLIP (t' from the mean over many templates), and p, p'
what both say of an image:

    loss = CE + TEXT_LOSS_WEIGHT mean|t - t'| + IMAGE_LOSS_WEIGHT mean|f - f'| + KL(p' | p) / C

The means are over all channels. In the end, the weighted mean of what stood there after each epoch is taken over. An
epoch's weight is a Gaussian of its number, with mean GPA_MEAN and deviation GPA_STD.

What methods with tokens in both encoders share is in base/deep_prompts.py. Legend: B images, C classes, E width of the
joint embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import key
from .base.deep_prompts import (
    DeepOutputs,
    DeepPromptClassifier,
    DeepPromptTrainer,
    IndependentConfig,
    IndependentLearner,
    token_count,
    token_depth,
)
from .clip import CLIP, IMAGENET_TEMPLATES, mean_text_features, sentences_of


def epoch_weights(epochs: int, mean: float, deviation: float) -> list[float]:
    """Return the weights of the epochs 1..`epochs`: a Gaussian of the epoch's number, scaled to a sum of 1."""
    exponents = [-0.5 * ((epoch - mean) / deviation) ** 2 for epoch in range(1, epochs + 1)]
    heights = [math.exp(exponent - max(exponents)) for exponent in exponents]  # so that not all are 0
    return [height / sum(heights) for height in heights]


def divergence(wanted: Tensor, logits: Tensor) -> Tensor:
    """Return the mean over images and classes of p' (log p' - log p), [], for logits [B, C] of p' and of p."""
    rows = F.kl_div(F.log_softmax(logits, dim=1), F.log_softmax(wanted, dim=1), reduction="sum", log_target=True)
    return rows / logits.numel()


class PromptSRCClassifier(DeepPromptClassifier):
    """CLIP with tokens in both encoders, and the frozen text features that they are held near.

    Args:
        clip, classnames, templates, learner: see DeepPromptClassifier.
        count: number of templates of the frozen text features.
    """

    frozen_texts: Tensor  # [C, E], normalized

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        templates: Sequence[str],
        learner: IndependentLearner,
        count: int,
    ) -> None:
        super().__init__(clip, classnames, templates, learner)
        many = templates if sentences_of(templates, classnames) else IMAGENET_TEMPLATES[:count]
        texts = F.normalize(mean_text_features(clip, classnames, many), dim=-1)
        self.register_buffer("frozen_texts", texts, persistent=False)


@dataclass(frozen=True)
class PromptSRCConfig(IndependentConfig):
    """Settings of PromptSRC; keys and defaults as published."""

    n_ctx_vision: int = token_count(4, "image tokens")
    n_ctx_text: int = token_count(4, "text tokens")
    prompt_depth_vision: int = token_depth(9, "the image encoder", source="9; 3 across datasets")
    prompt_depth_text: int = token_depth(9, "the text encoder", source="9; 3 across datasets")
    text_loss_weight: float = key(25.0, "weight of the distance of text features from frozen ones", low=0)
    image_loss_weight: float = key(10.0, "weight of the distance of image features from frozen ones", low=0)
    gpa_mean: float = key(15.0, "epoch that counts most in the mean of what is learnt", source="15; 30, 45 or 6")
    gpa_std: float = key(1.0, "deviation of the epochs' weights", above=0, source="1; 30, 5 or 10")
    n_templates: int = key(
        60, "how many of OpenAI's eighty ImageNet templates make the frozen text features", low=1, high=80
    )


@TRAINER_REGISTRY.register()
class PromptSRC(DeepPromptTrainer):
    """Self-regulating prompts."""

    paper = "Khattak et al. 2023b"
    learns = "tokens in both encoders, held near the frozen CLIP"
    config = PromptSRCConfig
    model_name = "VLPromptLearner"  # as published
    main_head = "promptsrc"
    network: PromptSRCClassifier
    _mean: dict[str, Tensor] | None = None  # the weighted sum, so far, of what was learnt

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> PromptSRCClassifier:
        """Build CLIP with tokens in both encoders."""
        learner = IndependentLearner.of_settings(clip, classnames, self.settings, type(self).__name__)
        return PromptSRCClassifier(clip, classnames, templates, learner, self.settings.n_templates)

    def more_losses(self, outputs: DeepOutputs) -> dict[str, Tensor]:
        """Return the weighted distances of texts, images and logits from those of the frozen CLIP."""
        network, settings = self.network, self.settings
        frozen = network.frozen_images(outputs.part)
        return {
            "text": settings.text_loss_weight * F.l1_loss(outputs.texts, network.frozen_texts),
            "image": settings.image_loss_weight * F.l1_loss(outputs.images, frozen),
            "logits": divergence(network.logits(frozen, network.frozen_texts), outputs.logits),
        }

    @torch.no_grad()
    def after_epoch(self) -> None:
        """Add what was learnt to the mean; after the last epoch, take the mean over."""
        weight = epoch_weights(self.max_epoch, self.settings.gpa_mean, self.settings.gpa_std)[self.epoch]
        learnt = dict(self.network.learner.named_parameters())
        earlier = self._mean or {}
        self._mean = {
            name: weight * p.detach() + (earlier[name].to(p.device) if name in earlier else 0)
            for name, p in learnt.items()
        }
        if self.epoch + 1 == self.max_epoch:
            for name, p in learnt.items():
                p.copy_(self._mean[name])
        super().after_epoch()

    def run_state(self) -> dict[str, Any]:
        """Return the weighted sum, so far, of what was learnt."""
        return {"mean": {name: value.cpu() for name, value in (self._mean or {}).items()}}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Put the sum that `run_state` returned back."""
        self._mean = dict(state["mean"]) or None

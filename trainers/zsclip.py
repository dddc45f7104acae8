"""Zero-shot CLIP: the dataset's prompt template, or an ensemble of templates. Nothing is trained.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021. In an ensemble, each prompt
is encoded and normalized; a class's features are averaged over the templates, and normalized again.

Legend: B images, C classes, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dassl.engine import TRAINER_REGISTRY

from .base import FeatureLearner, FeatureTrainer, MethodConfig, key
from .clip import CLIP, zeroshot_weights
from .clip.templates import ensemble_templates


@TRAINER_REGISTRY.register()
class ZeroshotCLIP(FeatureTrainer):
    """Zero-shot CLIP with the dataset's template."""

    node_name = "ZEROSHOTCLIP"
    paper = "Radford et al. 2021"
    learns = "nothing"
    main_head = "clip"
    cross_entropy = False

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build a learner that learns nothing and gives zero-shot logits."""
        return FeatureLearner(clip, classnames, zeroshot)

    def _register(self, learner: FeatureLearner, optim_cfg: Any) -> None:
        self._optim = None  # nothing to train or to save

    @classmethod
    def trains(cls, cfg: Any) -> bool:
        """Return False: a run goes straight to the test."""
        return False

    @torch.no_grad()
    def model_heads(self, input: Tensor) -> dict[str, Tensor]:
        """Return zero-shot logits [B, C] for images [B, 3, H, W] or features [B, E]."""
        return {"clip": self.network.both(input)[0]}


class EnsembleLearner(FeatureLearner):
    """A classifier by the weights of an ensemble of templates.

    Args:
        weights: [C, E], normalized.
    """

    weights: Tensor

    def __init__(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, weights: Tensor) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E]."""
        return self.scale * features @ self.weights.t()


@dataclass(frozen=True)
class EnsembleConfig(MethodConfig):
    """Settings of the ensemble."""

    templates: str = key(
        "select", "of ImageNet's templates: seven (select, as CoOp), or all eighty", choices=("select", "all")
    )


@TRAINER_REGISTRY.register()
class ZeroshotCLIP2(ZeroshotCLIP):
    """Zero-shot CLIP with an ensemble of templates, beside zero-shot CLIP with the dataset's template."""

    node_name = "ZEROSHOTCLIP2"
    paper = "Radford et al. 2021, prompt ensemble"
    learns = "nothing"
    config = EnsembleConfig
    main_head = "ensemble"

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the classifier by the ensemble's weights."""
        templates = ensemble_templates(self.templates(), self.settings.templates, self.cfg.DATASET.NAME)
        return EnsembleLearner(clip, classnames, zeroshot, zeroshot_weights(clip, classnames, templates))

    @torch.no_grad()
    def model_heads(self, input: Tensor) -> dict[str, Tensor]:
        """Return logits [B, C] of the dataset's template and of the ensemble, for images or features [B, E]."""
        clip_logits, logits = self.network.both(input)
        return {"clip": clip_logits, "ensemble": logits}

"""TaskRes: a learnt residual on the class weights of zero-shot CLIP.

Yu et al., Task Residual for Tuning Vision-Language Models, 2023. logits = s f normalize(T + alpha x)^T. T are the text
features of the class prompts as CLIP gives them (their length counts); x is a parameter of the same shape, zero at
first.

Legend: B images, C classes, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import FeatureLearner, FeatureTrainer, MethodConfig, kept_views, key
from .clip import CLIP, IMAGENET_TEMPLATES_SELECT_OWN, mean_text_features


def taskres_logits(features: Tensor, base: Tensor, residual: Tensor, alpha: float, scale: float) -> Tensor:
    """Return logits [B, C] for features [B, E], with base and residual [C, E]."""
    return scale * features @ F.normalize(base + alpha * residual, dim=-1).t()


class TaskResLearner(FeatureLearner):
    """The residual x on the class weights.

    Args:
        base: T, [C, E].
        alpha: scale of the residual.
    """

    CLASS_ROWS = ("residual",)

    base: Tensor

    def __init__(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, base: Tensor, alpha: float) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.alpha = alpha
        self.register_buffer("base", base, persistent=False)
        self.residual = nn.Parameter(torch.zeros_like(base))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E]."""
        return taskres_logits(features, self.base, self.residual, self.alpha, self.scale)


@dataclass(frozen=True)
class TaskResConfig(MethodConfig):
    """Settings of TaskRes."""

    views: int = kept_views(10)
    alpha: float = key(0.5, "scale of the residual", above=0, source="0.5, and 1 on OxfordFlowers")


@TRAINER_REGISTRY.register()
class TaskRes(FeatureTrainer):
    """A residual on the class weights, trained by cross-entropy."""

    recipe = 2
    node_name = "TASKRES"
    paper = "Yu et al. 2023"
    learns = "a residual on the class weights"
    config = TaskResConfig
    model_name = "taskres"
    main_head = "taskres"
    of_each_class = "weights"
    per_step = False  # as published
    imagenet_templates = IMAGENET_TEMPLATES_SELECT_OWN
    raw_mean = True

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the residual on the text features of the dataset's templates."""
        base = mean_text_features(clip, classnames, self.templates())
        return TaskResLearner(clip, classnames, zeroshot, base, self.settings.alpha)

"""CLAP: a linear probe that starts at the zero-shot prototypes and is held near them, by a strength per class.

Silva-Rodriguez et al., A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models, 2024. No validation
set is used.

    logits = s f normalize(P)^T,  P = T at first, the text features of the class prompts as CLIP gives them
    loss = CE(logits) + mean_c lambda_c |P_c - T_c|^2
    lambda_c = mean over the training images of class c of their zero-shot probability of c

An epoch takes as many batches as N images fill, at least one; they are drawn from the 20 N features of all views.

Legend: N training images, B images in a batch, C classes, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import FeatureLearner, FeatureTrainer, MethodConfig, kept_views
from .clip import CLIP, IMAGENET_TEMPLATES_SELECT_OWN, mean_text_features
from .features import FeatureSet


def class_multipliers(zeroshot_logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean zero-shot probability of the right class, by class; 0 for a class without images.

    Args:
        zeroshot_logits: [N, C]. labels: [N].

    Returns:
        [C].
    """
    right = zeroshot_logits.softmax(dim=1).gather(1, labels[:, None]).squeeze(1)  # [N]
    zeros = right.new_zeros(zeroshot_logits.shape[1])
    return zeros.index_add(0, labels, right) / zeros.index_add(0, labels, torch.ones_like(right)).clamp(min=1)


def clap_penalty(prototypes: Tensor, base: Tensor, multipliers: Tensor) -> Tensor:
    """Return mean_c lambda_c |P_c - T_c|^2, for prototypes P and base T [C, E] and multipliers lambda [C]."""
    return (multipliers * (prototypes - base).pow(2).sum(dim=1)).mean()


class CLAPLearner(FeatureLearner):
    """The class prototypes P and the multipliers lambda of their penalty.

    Args:
        base: T, [C, E].
    """

    CLASS_ROWS = ("prototypes", "multipliers")

    base: Tensor
    multipliers: Tensor

    def __init__(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, base: Tensor) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("multipliers", torch.zeros(len(base)))
        self.prototypes = nn.Parameter(base.clone())

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E]."""
        return self.scale * features @ F.normalize(self.prototypes, dim=-1).t()


@dataclass(frozen=True)
class CLAPConfig(MethodConfig):
    """Settings of CLAP. An epoch draws max(1, floor(N / batch size)) batches from the views of all N images."""

    views: int = kept_views(20, source="20")


@TRAINER_REGISTRY.register()
class CLAP(FeatureTrainer):
    """The class-adaptive linear probe."""

    recipe = 2
    node_name = "CLAP"
    paper = "Silva-Rodriguez et al. 2024"
    learns = "class prototypes held near the text"
    config = CLAPConfig
    model_name = "clap"
    main_head = "clap"
    of_each_class = "weights"
    per_step = False  # as published
    imagenet_templates = IMAGENET_TEMPLATES_SELECT_OWN
    raw_mean = True

    def epoch_steps(self) -> int:
        """Return the number of whole batches in one view, at least 1.

        The source counts the batches of its loader of images, which drops the last, smaller one.
        """
        return max(1, len(self.dm.dataset.train_x) // self.cfg.DATALOADER.TRAIN_X.BATCH_SIZE)

    def pooled_views(self) -> int:
        """Return the number of all views."""
        return max(1, self.views)

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the prototypes, which start as the mean text features of the templates."""
        return CLAPLearner(clip, classnames, zeroshot, mean_text_features(clip, classnames, self.templates()))

    def prepare(self, features: FeatureSet) -> None:
        """Compute the multipliers from the zero-shot logits of all views."""
        learner: Any = self.network.learner
        x, y = features.flat()
        learner.multipliers.copy_(class_multipliers(self.network(x), y))

    def loss(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the cross-entropy and the penalty."""
        learner: Any = self.network.learner
        penalty = clap_penalty(learner.prototypes, learner.base, learner.multipliers)
        return {"ce": self.class_loss(outputs, labels), "penalty": penalty}

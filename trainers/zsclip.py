"""Zero-shot CLIP: the dataset's prompt template, or an ensemble of templates. Nothing is trained.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021. In an ensemble each prompt
is encoded and normalised, averaged over the templates, and normalised again.

Legend: B images, C classes, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dassl.engine import TRAINER_REGISTRY

from .clip import CLIP, IMAGENET_TEMPLATES, IMAGENET_TEMPLATES_SELECT, zeroshot_weights
from .common import check_choice
from .compat import MayMakeNoStep
from .frozen import FeatureLearner, FeatureTrainer


def ensemble_templates(own: Sequence[str], which: str, dataset: str) -> list[str]:
    """The templates of the ensemble: ImageNet's, and for any other dataset its own ones, unless they are among them.

    Args:
        own: the dataset's templates.
        which: "select": seven of ImageNet's; "all": all eighty.
        dataset: the dataset's name.
    """
    templates = list(IMAGENET_TEMPLATES_SELECT if which == "select" else IMAGENET_TEMPLATES)
    return templates if dataset == "ImageNet" else [*templates, *(one for one in own if one not in templates)]


@TRAINER_REGISTRY.register()
class ZeroshotCLIP(MayMakeNoStep, FeatureTrainer):
    """Zero-shot CLIP with the dataset's template."""

    node_name = "ZEROSHOTCLIP"
    main_head = "clip"
    views_key = False

    @staticmethod
    def add_config(cfg: Any) -> None:
        """Adds TRAINER.ZEROSHOTCLIP to `cfg` unless it is there."""
        if "ZEROSHOTCLIP" not in cfg.TRAINER:
            cfg.TRAINER.ZEROSHOTCLIP = FeatureTrainer.new_node(cfg)

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Zero-shot logits."""
        return FeatureLearner(clip, classnames, zeroshot)

    def _register(self, learner: FeatureLearner, optim_cfg: Any) -> None:
        self._optim = None  # nothing to train or to save

    def has_training_step(self) -> bool:
        """There is none: a run goes straight to the test."""
        return False

    @torch.no_grad()
    def model_heads(self, input: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W] or features [B, E] -> logits [B, C]."""
        return {"clip": self.network.both(input)[0]}


class EnsembleLearner(FeatureLearner):
    """Logits by the weights of an ensemble.

    Args:
        weights: [C, E], normalised.
    """

    weights: Tensor

    def __init__(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, weights: Tensor) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, E] -> logits [B, C]."""
        return self.scale * features @ self.weights.t()


@TRAINER_REGISTRY.register()
class ZeroshotCLIP2(ZeroshotCLIP):
    """Zero-shot CLIP with an ensemble of templates, beside the one with the dataset's template."""

    node_name = "ZEROSHOTCLIP2"
    main_head = "ensemble"

    @staticmethod
    def add_config(cfg: Any) -> None:
        """Adds TRAINER.ZEROSHOTCLIP2 to `cfg` unless it is there."""
        if "ZEROSHOTCLIP2" not in cfg.TRAINER:
            node = FeatureTrainer.new_node(cfg)
            node.TEMPLATES = "select"  # of ImageNet's templates: select (seven of them, as CoOp) | all (eighty)
            cfg.TRAINER.ZEROSHOTCLIP2 = node

    def check_node(self, cfg: Any) -> None:
        """See LearnerTrainer."""
        check_choice(cfg, "TRAINER.ZEROSHOTCLIP2.TEMPLATES", ("select", "all"))

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Logits by the ensemble."""
        templates = ensemble_templates(self.templates(), self.node.TEMPLATES, self.cfg.DATASET.NAME)
        return EnsembleLearner(clip, classnames, zeroshot, zeroshot_weights(clip, classnames, templates))

    @torch.no_grad()
    def model_heads(self, input: Tensor) -> dict[str, Tensor]:
        """Images [B, 3, H, W] or features [B, E] -> logits [B, C] of the dataset's template and of the ensemble."""
        clip_logits, logits = self.network.both(input)
        return {"clip": clip_logits, "ensemble": logits}

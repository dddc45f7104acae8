"""MaPLe: tokens in front of the first blocks of both encoders, those of images made of those of texts.

Khattak et al., MaPLe: Multi-modal Prompt Learning, 2023. In front of each of the first J blocks of the text encoder
stand n learnt tokens t_j; in front of the same block of the image encoder stand W_j t_j + b_j. It is trained by
cross-entropy.

What methods with tokens in both encoders share is in base/deep_prompts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dassl.engine import TRAINER_REGISTRY

from .base.deep_prompts import (
    DeepPromptClassifier,
    DeepPromptTrainer,
    MappedConfig,
    MappedLearner,
    token_depth,
)
from .clip import CLIP


@dataclass(frozen=True)
class MaPLeConfig(MappedConfig):
    """Settings of MaPLe; keys and defaults as published."""

    prompt_depth: int = token_depth(9, "both encoders", source="9; 3 across datasets")


@TRAINER_REGISTRY.register()
class MaPLe(DeepPromptTrainer):
    """Multi-modal prompt learning."""

    paper = "Khattak et al. 2023a"
    learns = "tokens in both encoders, those of images made of those of texts"
    config = MaPLeConfig
    model_name = "MultiModalPromptLearner"  # as published
    main_head = "maple"

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> DeepPromptClassifier:
        """Build CLIP with tokens in both encoders."""
        settings = self.settings
        learner = MappedLearner(
            clip, classnames, settings.n_ctx, settings.prompt_depth, settings.ctx_init, type(self).__name__
        )
        return DeepPromptClassifier(clip, classnames, templates, learner)

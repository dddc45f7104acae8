"""IVLP: tokens in front of the first blocks of both encoders, learnt independently of each other.

Khattak et al., MaPLe: Multi-modal Prompt Learning, 2023, compare MaPLe with it ("independent V-L prompting"). It is
trained by cross-entropy. What methods with tokens in both encoders share is in base/deep_prompts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dassl.engine import TRAINER_REGISTRY

from .base.deep_prompts import (
    DeepPromptClassifier,
    DeepPromptTrainer,
    IndependentConfig,
    IndependentLearner,
    token_depth,
)
from .clip import CLIP


@dataclass(frozen=True)
class IVLPConfig(IndependentConfig):
    """Settings of IVLP; keys and defaults as published."""

    prompt_depth_vision: int = token_depth(9, "the image encoder", low=0, source="12; 9 in its train.py")
    prompt_depth_text: int = token_depth(9, "the text encoder", source="12; 9 in its train.py")


@TRAINER_REGISTRY.register()
class IVLP(DeepPromptTrainer):
    """Independent prompts of both encoders."""

    paper = "Khattak et al. 2023a"
    learns = "tokens in both encoders, each by itself"
    config = IVLPConfig
    model_name = "VLPromptLearner"  # as published
    main_head = "ivlp"

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> DeepPromptClassifier:
        """Build CLIP with tokens in both encoders."""
        learner = IndependentLearner.of_settings(clip, classnames, self.settings, type(self).__name__)
        return DeepPromptClassifier(clip, classnames, templates, learner)

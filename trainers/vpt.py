"""VPT: tokens in front of the first blocks of the image encoder; texts are those of one fixed prompt.

Jia et al., Visual Prompt Tuning, 2022 (its deep form), as Khattak et al., MaPLe, 2023, train it on CLIP, by
cross-entropy. What methods with learnt tokens share is in base/deep_prompts.py.

Legend: C classes, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dassl.engine import TRAINER_REGISTRY

from .base import MethodConfig, key, precision
from .base.deep_prompts import (
    DeepPromptClassifier,
    DeepPromptTrainer,
    ImageTokenLearner,
    token_count,
    token_depth,
)
from .clip import CLIP, zeroshot_weights
from .modules.deep_prompts import IndependentTokens


class VPTLearner(ImageTokenLearner):
    """The image tokens. For names see IndependentTokens.

    Args:
        clip: the frozen CLIP.
        classnames: class names in the order of their labels.
        settings: see VPTConfig.
        words: what stands before the class name.
    """

    def __init__(self, clip: CLIP, classnames: Sequence[str], settings: VPTConfig, words: str) -> None:
        super().__init__(clip, classnames, words, "VPT")
        blocks = range(1, min(settings.prompt_depth_vision, clip.visual.depth) + 1)
        self.image_encoder = IndependentTokens(settings.n_ctx_vision, clip.visual.widths[1], blocks)

    def image_tokens(self) -> dict[int, Tensor]:
        """Return the image tokens of each block; see ImageTokenLearner."""
        return self.image_encoder.by_block()


class VPTClassifier(DeepPromptClassifier):
    """CLIP with learnt tokens in front of the image encoder's blocks.

    Args:
        clip, classnames, templates: see Classifier.
        settings: see VPTConfig.
    """

    learner: VPTLearner  # type: ignore[assignment]  # it has no text tokens

    def __init__(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str], settings: VPTConfig) -> None:
        words = settings.ctx_init.replace("_", " ").strip()
        super().__init__(clip, classnames, templates, VPTLearner(clip, classnames, settings, words))
        self._texts = zeroshot_weights(clip, classnames, [f"{words} {{}}.".strip()]).float()

    def text_features(self) -> Tensor:
        """Return the text features [C, E] of the prompt, normalized, fp32; nothing of them is learnt."""
        return self._texts


@dataclass(frozen=True)
class VPTConfig(MethodConfig):
    """Settings of VPT; keys and defaults as published."""

    n_ctx_vision: int = token_count(2, "image tokens", source="8; 2 in its train.py")
    ctx_init: str = key("a photo of a", "words before the class name", words=True)
    prec: str = precision("fp16")
    prompt_depth_vision: int = token_depth(1, "the image encoder", source="12; 1 in its train.py")


@TRAINER_REGISTRY.register()
class VPT(DeepPromptTrainer):
    """Visual prompt tuning."""

    paper = "Jia et al. 2022"
    learns = "tokens in the image encoder"
    config = VPTConfig
    model_name = "prompt_learner"  # as published
    main_head = "vpt"

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> DeepPromptClassifier:
        """Build CLIP with tokens in the image encoder."""
        return VPTClassifier(clip, classnames, templates, self.settings)

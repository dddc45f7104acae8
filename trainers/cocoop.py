"""CoCoOp: CoOp's context, shifted for each image by a small network that sees the image's feature.

Zhou et al., Conditional Prompt Learning for Vision-Language Models, 2022. Each image has prompts of its own, so the
text encoder runs once per image over all classes. The common beginning of an image's prompts is computed once, and
prompts are cut to the length of the longest one; the results are those of the full 77 tokens.

Legend: B images, C classes, n context vectors, D width of the text encoder, E width of the joint embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import Classifier, EncoderTrainer, MethodConfig, PromptLearner, initial_context, key, precision
from .clip import CLIP
from .features import FrozenPart

REDUCTION = 16  # hidden width of the meta network: E / 16


class ConditionalPromptLearner(PromptLearner):
    """The context vectors and the meta network. The names in its state are the published ones.

    Args:
        clip: the frozen CLIP.
        classnames: class names in the order of their labels.
        settings: see CoCoOpConfig.
    """

    def __init__(self, clip: CLIP, classnames: Sequence[str], settings: CoCoOpConfig) -> None:
        super().__init__(clip, classnames, *initial_context(clip, settings.n_ctx, settings.ctx_init))
        hidden = max(1, clip.embed_dim // REDUCTION)
        self.meta_net = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(clip.embed_dim, hidden),
                relu=nn.ReLU(),
                linear2=nn.Linear(hidden, clip.text.width),
            )
        )

    def contexts(self, features: Tensor) -> Tensor:
        """Return contexts [B, n, D] for normalized image features [B, E], in fp32 even under autocast."""
        with torch.autocast(device_type=features.device.type, enabled=False):
            return self.ctx + self.meta_net(features.float()).unsqueeze(1)


class CoCoOpClassifier(Classifier):
    """CLIP with prompts conditioned on the image."""

    learner: ConditionalPromptLearner

    def classify(self, part: FrozenPart) -> Tensor:
        """Return logits [B, C] for the features of images."""
        assert part.features is not None
        text, learner = self.clip.text, self.learner
        features = F.normalize(part.features, dim=-1)
        rows = []
        for feature, context in zip(features, learner.contexts(features), strict=True):
            texts = F.normalize(text.suffix(learner.prompts.state(text, context), 1).float(), dim=-1)  # [C, E]
            rows.append(self.logits(feature[None], texts))
        return torch.cat(rows)


@dataclass(frozen=True)
class CoCoOpConfig(MethodConfig):
    """Settings of CoCoOp; keys and defaults as published."""

    n_ctx: int = key(16, "number of context vectors; with CTX_INIT its number of tokens counts", low=1)
    ctx_init: str = key("", "words that the context starts as, such as 'a photo of a'; '': random", words=True)
    prec: str = precision("fp16")


@TRAINER_REGISTRY.register()
class CoCoOp(EncoderTrainer):
    """Conditional context optimization."""

    node_name = "COCOOP"
    paper = "Zhou et al. 2022b"
    learns = "context vectors, and a network that shifts them by image"
    config = CoCoOpConfig
    model_name = "prompt_learner"  # as published
    main_head = "cocoop"

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> CoCoOpClassifier:
        """Build CLIP with a conditional prompt learner."""
        learner = ConditionalPromptLearner(clip, classnames, self.settings)
        return CoCoOpClassifier(clip, classnames, templates, learner)

"""KgCoOp: CoOp whose text features are held near those of the dataset's template.

Yao et al., Visual-Language Prompt Tuning with Knowledge-guided Context Optimization, 2023 (equation 5). With t_i the
text feature of class i under the learnt prompt and w_i that of zero-shot CLIP:

    loss = CE + W (1 - mean_i cos(t_i, w_i))

What prompt methods share is in base/prompts.py. Legend: C classes, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dassl.engine import TRAINER_REGISTRY

from .base import (
    DePTKeys,
    MethodConfig,
    PromptClassifier,
    PromptLearner,
    PromptOutputs,
    PromptTrainer,
    distance_to,
    initial_context,
    key,
    precision,
)
from .clip import CLIP


class KgCoOpLearner(PromptLearner):
    """The context vectors. Published checkpoints have further entries, which nothing uses; they are left out."""

    RECOMPUTED = (*PromptLearner.RECOMPUTED, "bias_vectors", "meta_net.linear1.weight", "meta_net.linear1.bias")


@dataclass(frozen=True)
class KgCoOpConfig(MethodConfig):
    """Settings of KgCoOp; defaults as in its experiments."""

    n_ctx: int = key(4, "number of context vectors; with CTX_INIT its number of tokens counts", low=1)
    ctx_init: str = key("a photo of a", "words that the context starts as; '': random", words=True)
    w: float = key(8.0, "weight of the distance to zero-shot CLIP's text features", low=0)
    prec: str = precision("fp16", "the context is kept in fp32")
    dept: DePTKeys = field(default_factory=DePTKeys)


@TRAINER_REGISTRY.register()
class KgCoOp(PromptTrainer):
    """Knowledge-guided context optimization."""

    paper = "Yao et al. 2023"
    learns = "context vectors of the prompts"
    config = KgCoOpConfig

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> PromptClassifier:
        """Build CLIP with a prompt learner."""
        settings = self.settings
        context, words = initial_context(clip, settings.n_ctx, settings.ctx_init)
        learner = KgCoOpLearner(clip, classnames, context, words, dept=settings.dept)
        return PromptClassifier(clip, classnames, templates, learner)

    def more_losses(self, outputs: PromptOutputs) -> dict[str, Tensor]:
        """Return W times the mean cosine distance of text features to those of zero-shot CLIP."""
        return {"kg": self.settings.w * distance_to(self.network.zeroshot, outputs.texts)}

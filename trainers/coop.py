"""CoOp: the words around the class name are learnt, as vectors, through the frozen text encoder.

Zhou et al., Learning to Prompt for Vision-Language Models, 2022. The prompts are cut to the length of the
longest one, and their common beginning is computed once; the results are those of the full 77 tokens.

Legend: B images, C classes, n context vectors, D width of the text encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import Classifier, EncoderTrainer, Learner, MethodConfig, class_rows, key, precision
from .clip import CLIP
from .features import FrozenPart
from .modules.context_prompts import POSITIONS, ContextPrompts, word_vectors

logger = logging.getLogger(__name__)


def initial_context(clip: CLIP, n_ctx: int, words: str) -> tuple[Tensor, str]:
    """Return the initial context vectors [n, D], and the words to tokenize in their place.

    Args:
        clip: the frozen CLIP.
        n_ctx: n, where there are no words.
        words: the vectors start as the token embeddings of these words; "": as normal draws with deviation 0.02.
    """
    words = words.replace("_", " ").strip()
    if words:
        return word_vectors(clip.text, words), words
    return 0.02 * torch.randn(n_ctx, clip.text.width), ""


class PromptLearner(Learner):
    """The context vectors. The names in its state are the published ones: ctx, token_prefix, token_suffix.

    Args:
        clip: the frozen CLIP.
        classnames: class names in the order of their labels.
        settings: see CoOpConfig. CTX_INIT gives the words whose embeddings the vectors start as; n is then their number
            of tokens, and CSC is ignored.
    """

    RECOMPUTED = ("token_prefix", "token_suffix")

    def __init__(self, clip: CLIP, classnames: Sequence[str], settings: CoOpConfig) -> None:
        n_ctx, csc, words = settings.n_ctx, settings.csc, settings.ctx_init
        position = settings.class_token_position
        facts = {"backbone": clip.name, "weights_digest": clip.weights_digest, "position": position}
        super().__init__(classnames, facts)
        if csc and words:
            logger.warning("CSC is ignored: with CTX_INIT one context is learnt for all classes")
            csc = False
        context, words = initial_context(clip, n_ctx, words)
        if csc:
            context = 0.02 * torch.randn(len(classnames), *context.shape)
        self.ctx = nn.Parameter(context)
        self.prompts = ContextPrompts(clip.text, classnames, context.shape[-2], words, position)
        self.register_buffer("token_prefix", self.prompts.prefix)
        self.register_buffer("token_suffix", self.prompts.suffix)

    def for_classes(
        self, state: dict[str, Tensor], trained: Sequence[str] | None, indices: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """Return `state`; where each class has a context of its own (CSC), with those of the present classes only."""
        if self.ctx.ndim < 3 or state["ctx"].ndim < 3 or trained is None:
            return state
        return {**state, "ctx": state["ctx"][class_rows(self.classnames, trained, indices, "a context (CSC)")]}


class CoOpClassifier(Classifier):
    """CLIP with learnt prompts."""

    learner: PromptLearner

    def compute_text(self) -> Tensor:
        """Compute the text features [C, E] of the learnt prompts, normalized, fp32."""
        text, learner = self.clip.text, self.learner
        return F.normalize(text.suffix(learner.prompts.state(text, learner.ctx), 1).float(), dim=-1)

    def classify(self, part: FrozenPart) -> Tensor:
        """Return logits [B, C] for the features of images."""
        assert part.features is not None
        return self.logits(part.features, self.text_features())


@dataclass(frozen=True)
class CoOpConfig(MethodConfig):
    """Settings of CoOp; keys and defaults as published."""

    n_ctx: int = key(16, "number of context vectors; with CTX_INIT its number of tokens counts", low=1)
    csc: bool = key(False, "a context for each class; it can then classify no other classes")
    ctx_init: str = key("", "words that the context starts as, such as 'a photo of a'; '': random", words=True)
    prec: str = precision("fp16", "the context is kept in fp32")
    class_token_position: str = key("end", "where the class name is, beside the context", choices=POSITIONS)


@TRAINER_REGISTRY.register()
class CoOp(EncoderTrainer):
    """Context optimization."""

    node_name = "COOP"
    paper = "Zhou et al. 2022a"
    learns = "context vectors of the prompts"
    config = CoOpConfig
    model_name = "prompt_learner"  # as published
    main_head = "coop"

    @classmethod
    def each_class_has(cls, cfg: Any) -> str:
        """Return "a context (CSC)" where CSC is set and CTX_INIT, which overrules it, is not; else ""."""
        node = cfg.TRAINER.COOP
        return "a context (CSC)" if node.CSC and not node.CTX_INIT else ""

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> CoOpClassifier:
        """Build CLIP with a prompt learner."""
        return CoOpClassifier(clip, classnames, templates, PromptLearner(clip, classnames, self.settings))

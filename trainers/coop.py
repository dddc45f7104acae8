"""CoOp: the words around the class name are learnt, as vectors, through the frozen text encoder.

Zhou et al., Learning to Prompt for Vision-Language Models, 2022. What prompt methods share is in base/prompts.py.

Legend: C classes, n context vectors, D width of the text encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dassl.engine import TRAINER_REGISTRY

from .base import (
    DePTKeys,
    MethodConfig,
    PromptClassifier,
    PromptLearner,
    PromptTrainer,
    initial_context,
    key,
    precision,
)
from .clip import CLIP
from .modules.context_prompts import POSITIONS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CoOpConfig(MethodConfig):
    """Settings of CoOp; keys and defaults as published."""

    n_ctx: int = key(16, "number of context vectors; with CTX_INIT its number of tokens counts", low=1)
    csc: bool = key(False, "a context for each class; it can then classify no other classes")
    ctx_init: str = key("", "words that the context starts as, such as 'a photo of a'; '': random", words=True)
    prec: str = precision("fp16", "the context is kept in fp32")
    class_token_position: str = key("end", "where the class name is, beside the context", choices=POSITIONS)
    dept: DePTKeys = field(default_factory=DePTKeys)


def build_learner(clip: CLIP, classnames: Sequence[str], settings: CoOpConfig) -> PromptLearner:
    """Build the prompt learner.

    CTX_INIT gives the words whose embeddings the vectors start as; n is then their number of tokens, and CSC is
    ignored.
    """
    csc = settings.csc
    context, words = initial_context(clip, settings.n_ctx, settings.ctx_init)
    if csc and words:
        logger.warning("CSC is ignored: with CTX_INIT one context is learnt for all classes")
        csc = False
    if csc:
        context = 0.02 * torch.randn(len(classnames), *context.shape)
    return PromptLearner(clip, classnames, context, words, settings.class_token_position, dept=settings.dept)


@TRAINER_REGISTRY.register()
class CoOp(PromptTrainer):
    """Context optimization."""

    node_name = "COOP"
    paper = "Zhou et al. 2022a"
    learns = "context vectors of the prompts"
    config = CoOpConfig
    main_head = "coop"

    @classmethod
    def each_class_has(cls, cfg: Any) -> str:
        """Return "a context (CSC)" where CSC is set and CTX_INIT, which overrules it, is not; else ""."""
        node = cfg.TRAINER.COOP
        return "a context (CSC)" if node.CSC and not node.CTX_INIT else ""

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> PromptClassifier:
        """Build CLIP with a prompt learner."""
        return PromptClassifier(clip, classnames, templates, build_learner(clip, classnames, self.settings))

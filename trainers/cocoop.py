"""CoCoOp: CoOp's context, shifted for each image by a small network that sees the image's feature.

Zhou et al., Conditional Prompt Learning for Vision-Language Models, 2022. Each image has prompts of its own, so the
text encoder runs once per image over all classes; what these prompts begin with is computed once per image, and they
are cut at the longest one: the numbers are those of the full 77 tokens.

Legend: B images, C classes, n context vectors, D width of the text encoder, E width of the joint embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import Classifier, EncoderTrainer, check_whole, check_words
from .clip import CLIP
from .coop import PromptLearner

REDUCTION = 16  # hidden width of the meta network: E / 16


class ConditionalPromptLearner(PromptLearner):
    """The context vectors and the meta network. Its state has the published names.

    Args:
        clip: the frozen CLIP.
        classnames: class names in the order of their labels.
        n_ctx, words: see PromptLearner.
    """

    def __init__(self, clip: CLIP, classnames: Sequence[str], *, n_ctx: int = 16, words: str = "") -> None:
        super().__init__(clip, classnames, n_ctx=n_ctx, words=words)
        hidden = max(1, clip.embed_dim // REDUCTION)
        self.meta_net = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(clip.embed_dim, hidden),
                relu=nn.ReLU(),
                linear2=nn.Linear(hidden, clip.text.width),
            )
        )

    def contexts(self, features: Tensor) -> Tensor:
        """Normalised image features [B, E] -> contexts [B, n, D]; in fp32 even under autocast."""
        with torch.autocast(device_type=features.device.type, enabled=False):
            return self.ctx + self.meta_net(features.float()).unsqueeze(1)


class CoCoOpClassifier(Classifier):
    """CLIP with prompts conditioned on the image."""

    learner: ConditionalPromptLearner

    def _conditional(self, features: Tensor) -> Tensor:
        """Image features [B, E] -> logits [B, C]."""
        text, learner = self.clip.text, self.learner
        features = F.normalize(features.float(), dim=-1)
        rows = []
        for feature, context in zip(features, learner.contexts(features), strict=True):
            texts = F.normalize(text.suffix(learner.prompts.state(text, context), 1).float(), dim=-1)  # [C, E]
            rows.append(self.logits(feature[None], texts))
        return torch.cat(rows)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, C]."""
        with torch.no_grad():
            features = self.clip.encode_image(images)
        return self._conditional(features)

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> zero-shot logits and those of the conditional prompts."""
        features = self.clip.encode_image(images)
        return self.logits(features, self.zeroshot), self._conditional(features)


@TRAINER_REGISTRY.register()
class CoCoOp(EncoderTrainer):
    """Conditional context optimisation."""

    node_name = "COCOOP"
    model_name = "prompt_learner"  # as published
    main_head = "cocoop"

    @staticmethod
    def add_config(cfg: Any) -> None:
        """Adds TRAINER.COCOOP to `cfg` unless it is there; keys and defaults as published."""
        if "COCOOP" in cfg.TRAINER:
            return
        node = type(cfg)()
        node.N_CTX = 16  # number of context vectors, at least 1; with CTX_INIT its number of tokens counts
        node.CTX_INIT = ""  # words that the context starts as, e.g. "a photo of a"; "": random
        node.PREC = "fp16"  # precision of the frozen CLIP: fp32 | fp16 | amp | bf16; what is learnt is kept in fp32
        cfg.TRAINER.COCOOP = node

    def check_node(self, cfg: Any) -> None:
        """Checks TRAINER.COCOOP."""
        check_whole(cfg, "TRAINER.COCOOP.N_CTX")
        check_words(cfg, "TRAINER.COCOOP.CTX_INIT")

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> CoCoOpClassifier:
        """CLIP with a conditional prompt learner."""
        node = self.cfg.TRAINER.COCOOP
        learner = ConditionalPromptLearner(clip, classnames, n_ctx=node.N_CTX, words=node.CTX_INIT)
        return CoCoOpClassifier(clip, classnames, templates, learner)

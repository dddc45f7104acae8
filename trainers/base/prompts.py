"""Share what methods have in common that learn the words around the class names, as vectors (CoOp and its successors).

The prompts are cut to the length of the longest one, and their common beginning is computed once; the results are those
of the full 77 tokens. No block of the image tower is adapted: a step needs the images' features alone.

Legend: B images, C classes, n context vectors, D width of the text encoder, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.optim import build_optimizer

from ..clip import CLIP
from ..features.kept_views import FrozenPart
from ..modules.context_prompts import ContextPrompts, word_vectors
from .dept import DePTHead, DePTKeys
from .encoder_trainer import EncoderTrainer
from .learner import Classifier, Learner, class_rows


def initial_context(clip: CLIP, n_ctx: int, words: str = "") -> tuple[Tensor, str]:
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


def distance_to(zeroshot: Tensor, texts: Tensor) -> Tensor:
    """Return the mean cosine distance [] of text features [C, E] to normalized ones of zero-shot CLIP, [C, E]."""
    return 1 - (F.normalize(texts, dim=-1) * zeroshot).sum(dim=-1).mean()


class PromptLearner(Learner):
    """The context vectors. The names in its state are the published ones: ctx, token_prefix, token_suffix.

    Args:
        clip: the frozen CLIP.
        classnames: class names in the order of their labels.
        context: the initial vectors, one context for all classes [n, D] or one for each [C, n, D].
        words: n tokens that stand in the vectors' place when prompts are tokenized; "": placeholders.
        position: where the class name is, see ContextPrompts.
        rest: what follows the vectors, with {} for the class name.
        dept: settings of DePT; None, or a weight of 0: without it.
    """

    RECOMPUTED: tuple[str, ...] = ("token_prefix", "token_suffix")

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        context: Tensor,
        words: str = "",
        position: str = "end",
        rest: str = "{}.",
        dept: DePTKeys | None = None,
    ) -> None:
        facts = {"backbone": clip.name, "weights_digest": clip.weights_digest, "position": position}
        super().__init__(classnames, facts)
        self.ctx = nn.Parameter(context)
        self.prompts = ContextPrompts(clip.text, classnames, context.shape[-2], words, position, rest)
        self.register_buffer("token_prefix", self.prompts.prefix)
        self.register_buffer("token_suffix", self.prompts.suffix)
        self.dept = DePTHead(clip.embed_dim, len(classnames)) if dept is not None and dept.weight else None
        self.dept_weight = dept.weight if dept is not None else 0.0

    def for_classes(
        self, state: dict[str, Tensor], trained: Sequence[str] | None, indices: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """Return `state` for the present classes: their own contexts (CSC), their rows of DePT's classifier."""
        if self.ctx.ndim == 3 and state["ctx"].ndim == 3 and trained is not None:
            state = {**state, "ctx": state["ctx"][class_rows(self.classnames, trained, indices, "a context (CSC)")]}
        if self.dept is not None:
            state = {**state, **self.dept.for_classes(state, "dept.", self.classnames, trained, indices)}
        return state


class PromptOutputs(NamedTuple):
    """Hold what a training step of prompts computes.

    Attributes:
        logits: [B, C], with gradients.
        texts: text features [C, E], not normalized, fp32, with gradients.
        features: image features [B, E], not normalized, fp32.
    """

    logits: Tensor
    texts: Tensor
    features: Tensor


class PromptClassifier(Classifier):
    """CLIP with learnt prompts."""

    learner: PromptLearner

    def encode_texts(self) -> Tensor:
        """Encode the learnt prompts: text features [C, E], not normalized, fp32."""
        text, learner = self.clip.text, self.learner
        return text.suffix(learner.prompts.state(text, learner.ctx), 1).float()

    def compute_text(self) -> Tensor:
        """Compute the text features [C, E] of the learnt prompts, normalized, fp32."""
        return F.normalize(self.encode_texts(), dim=-1)

    def outputs(self, images: Tensor | FrozenPart) -> PromptOutputs:
        """Return what a training step needs, for images [B, 3, H, W] or their frozen part."""
        features = (images if isinstance(images, FrozenPart) else self.frozen_part(images)).features
        assert features is not None
        texts = self.encode_texts()
        return PromptOutputs(self.logits(features, F.normalize(texts, dim=-1)), texts, features)

    def classify(self, part: FrozenPart) -> Tensor:
        """Return logits [B, C] for the features of images; in evaluation mode with the share of DePT's classifier."""
        assert part.features is not None
        logits, learner = self.logits(part.features, self.text_features()), self.learner
        if learner.dept is None or not learner.dept.applies or learner.training:
            return logits
        return (1 - learner.dept_weight) * logits + learner.dept_weight * learner.dept(part.features)


class PromptTrainer(EncoderTrainer):
    """Train prompts by cross-entropy and what a subclass adds; with DePT, if its configuration has a field `dept`."""

    network: PromptClassifier
    model_name = "prompt_learner"  # as published

    def build_optimizer(self, learner: PromptLearner) -> Any:
        """Build the optimizer; DePT's classifier has a learning rate of its own."""
        if learner.dept is None:
            return super().build_optimizer(learner)
        head = list(learner.dept.parameters())
        known = {id(p) for p in head}
        rest = [p for p in learner.parameters() if id(p) not in known]
        node = self.cfg.OPTIM
        groups = [{"params": rest}, {"params": head, "lr": node.LR * self.settings.dept.lr_factor}]
        return build_optimizer(learner, node, param_groups=groups)

    def run(self, inputs: Any, labels: Tensor) -> PromptOutputs:
        """Return logits, text features and image features of a step; see PromptOutputs."""
        return self.network.outputs(inputs)

    def shown_logits(self, outputs: PromptOutputs) -> Tensor:
        """Return the logits [B, C] of the prompts."""
        return outputs.logits

    def more_losses(self, outputs: PromptOutputs) -> dict[str, Tensor]:
        """Return the named losses that the method adds to cross-entropy; here none."""
        return {}

    def loss(self, outputs: PromptOutputs, labels: Tensor) -> dict[str, Tensor]:
        """Return the named losses: cross-entropy, DePT's, and those of the method."""
        loss, learner = self.class_loss(outputs.logits, labels), self.network.learner
        terms = {}
        if learner.dept is not None:
            weight = learner.dept_weight
            linear, doubled = learner.dept.trained_on(outputs.features, outputs.texts, labels)
            loss, terms["linear"] = (1 - weight) * loss, weight * self.class_loss(linear, doubled)
        terms |= self.more_losses(outputs)
        return {"ce": loss, **terms} if terms else {"loss": loss}

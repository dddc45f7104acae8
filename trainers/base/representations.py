"""Share what MMRL and MMRL++ have in common: tokens in the later layers of both encoders, and a second image feature.

In front of block REP_START of both encoders n tokens are inserted, behind the class token and behind the start of text;
they are replaced in front of the blocks up to REP_END. With f the feature of the class token (through CLIP's own
projection), g that of the mean of the inserted tokens (through a learnt one) and t the text features:

    logits = ALPHA s f T^T + (1 - ALPHA) s g T^T        classes that were trained on
    logits = s f T^T                                    other classes
    loss   = ALPHA CE(f) + (1 - ALPHA) CE(g) + REG_WEIGHT [(1 - mean cos(f, f')) + (1 - mean cos(t, t'))]

f' and t' are the frozen CLIP's. What comes before REP_START is frozen in both encoders.

Legend: B images, C classes, n tokens, D width of the image encoder, E width of the joint embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..clip import CLIP, BlockEdit, fill_template
from ..features.kept_views import FrozenPart
from ..modules.deep_prompts import FrontTokens
from ..modules.representations import MappedRepresentations, SharedRepresentations
from .deep_prompts import FOR_TOKENS, WholeModelLearner
from .encoder_trainer import EncoderTrainer
from .keys import MethodConfig, check_number, key, precision
from .learner import Classifier, class_rows

logger = logging.getLogger(__name__)
HEADS = ("auto", "both", "class")


@dataclass(frozen=True)
class RepresentationConfig(MethodConfig):
    """Settings that MMRL and MMRL++ share."""

    alpha: float = key(0.7, "share of the class token's head in loss and logits", low=0, high=1)
    reg_weight: float = key(0.5, "weight of the distances from the frozen CLIP", low=0, source="0.01 to 7, by dataset")
    n_rep_tokens: int = key(5, "number of tokens in front of a block", low=1)
    rep_start: int = key(6, "block of both encoders, from 1, in front of which tokens are inserted", low=1)
    rep_end: int = key(
        12, "last block in front of which they are replaced, at least REP_START; clipped to each depth", low=1
    )
    rep_dim: int = key(512, "width of the tokens before they are mapped", low=1)
    heads: str = key(
        "auto",
        "which heads give logits: both; class, the class token's alone; auto: both where all classes were trained on, "
        "else the class token's",
        choices=HEADS,
        source="by its key TASK",
    )
    prec: str = precision("amp")

    def check(self, path: str) -> None:
        """Check that the last block with tokens does not come before the first; see MethodConfig."""
        check_number(self.rep_end, f"{path}.REP_END", low=self.rep_start)


class RepresentationLearner(WholeModelLearner):
    """The tokens, their maps, and the projection of the second image feature, which a subclass adds.

    Args:
        clip: the frozen CLIP.
        classnames: class names in the order of their labels.
        settings: see RepresentationConfig.
        method: for messages.

    Attributes:
        applies: whether the present classes were trained on.

    Raises:
        ValueError: the encoders have too few blocks, or the image encoder is a ResNet.
    """

    RECOMPUTED = (*WholeModelLearner.RECOMPUTED, "prompt_embeddings")
    representation_learner: MappedRepresentations | SharedRepresentations
    share = 1.0  # of new tokens where they replace others; see FrontTokens

    def __init__(self, clip: CLIP, classnames: Sequence[str], settings: RepresentationConfig, method: str) -> None:
        last = min(settings.rep_end, clip.text.depth, clip.visual.depth)
        if settings.rep_start > last:
            raise ValueError(
                f"Expected TRAINER.{method.upper()}.REP_START to be at most {last}, the encoders' depth, "
                f"but got {settings.rep_start}"
            )
        facts = {"backbone": clip.name, "weights_digest": clip.weights_digest, "rep_start": settings.rep_start}
        super().__init__(classnames, facts)
        self.blocks = range(settings.rep_start, last + 1)
        self.heads, self.applies = settings.heads, True
        clip.visual.check_edits([FrontTokens({1: torch.zeros(1, 1)})], method)

    @property
    def uses_both(self) -> bool:
        """Say whether both heads give the logits."""
        return self.heads == "both" or (self.heads == "auto" and self.applies)

    def edit(self, tokens: Sequence[Tensor]) -> BlockEdit:
        """Return the edit of an encoder that puts in the tokens [n, D] of each layer."""
        return FrontTokens(dict(zip(self.blocks, tokens, strict=True)), inserted=True, share=self.share)

    def projection(self, own: Tensor) -> Tensor:
        """Return the matrix [D, E] of the second image feature, for CLIP's own."""
        raise NotImplementedError

    def for_classes(
        self, state: dict[str, Tensor], trained: Sequence[str] | None, indices: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """Return `state`, and note whether the present classes were trained on."""
        self.applies = True
        if trained is not None:
            try:
                class_rows(self.classnames, trained, indices)
            except ValueError:
                self.applies = False
                logger.info("Not all of the %d classes were trained on", len(self.classnames))
        return state


class RepresentationOutputs(NamedTuple):
    """Hold what a training step computes.

    Attributes:
        logits: of the class token's head, [B, C], with gradients.
        second: of the inserted tokens' head, [B, C], with gradients.
        images: image features [B, E] of the class token, normalized, fp32, with gradients.
        texts: text features [C, E], normalized, fp32, with gradients.
        frozen: image features [B, E] of the frozen CLIP, normalized, fp32.
    """

    logits: Tensor
    second: Tensor
    images: Tensor
    texts: Tensor
    frozen: Tensor


class RepresentationClassifier(Classifier):
    """CLIP with tokens in the later layers of both encoders.

    Args:
        clip, classnames, learner: see Classifier.
        templates: those of the zero-shot reference; the first is the prompt that is trained with.
        settings: see RepresentationConfig.
    """

    learner: RepresentationLearner

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        templates: Sequence[str],
        learner: RepresentationLearner,
        settings: RepresentationConfig,
    ) -> None:
        super().__init__(clip, classnames, templates, learner)
        self.alpha, self.count = settings.alpha, settings.n_rep_tokens
        self.start = self.first_adapted = learner.blocks[0]
        prompts = [fill_template(templates[0], name) for name in classnames]
        with torch.no_grad():
            self._text_state = clip.text.prefix(clip.text.tokenise(prompts), self.start - 1)

    @torch.no_grad()
    def frozen_part(self, images: Tensor) -> FrozenPart:
        """Return what enters the first block with tokens, and the frozen CLIP's features [B, E], fp32."""
        visual = self.clip.visual
        hidden = visual.prefix(images, self.start - 1)
        return FrozenPart(visual.suffix(hidden, self.start).float(), hidden)

    def compute_text(self) -> Tensor:
        """Compute the text features [C, E], normalized, fp32."""
        edit = self.learner.edit(self.learner.representation_learner.text())
        return F.normalize(self.clip.text.suffix(self._text_state, self.start, [edit]).float(), dim=-1)

    def encode_images(self, part: FrozenPart) -> tuple[Tensor, Tensor]:
        """Return the features of the class token and of the inserted tokens, [B, E] each, normalized, fp32."""
        assert part.hidden is not None
        visual, learner = self.clip.visual, self.learner
        edit = learner.edit(learner.representation_learner.image())
        tokens = visual.first_tokens(part.hidden, self.start, [edit], 1 + self.count)
        own, _ = visual.projection()
        first = tokens[:, 0] @ own
        with torch.autocast(device_type=tokens.device.type, enabled=False):
            second = tokens[:, 1:].float().mean(dim=1) @ learner.projection(own.float())
            return F.normalize(first.float(), dim=-1), F.normalize(second, dim=-1)

    def blend(self, logits: Tensor, second: Tensor) -> Tensor:
        """Return the logits [B, C] of both heads."""
        return self.alpha * logits + (1 - self.alpha) * second

    def outputs(self, images: Tensor | FrozenPart) -> RepresentationOutputs:
        """Return what a training step needs, for images [B, 3, H, W] or their frozen part."""
        part = images if isinstance(images, FrozenPart) else self.frozen_part(images)
        assert part.features is not None
        (first, second), texts = self.encode_images(part), self.text_features()
        frozen = F.normalize(part.features, dim=-1)
        return RepresentationOutputs(self.logits(first, texts), self.logits(second, texts), first, texts, frozen)

    def classify(self, part: FrozenPart) -> Tensor:
        """Return logits [B, C] for the frozen part of images."""
        (first, second), texts = self.encode_images(part), self.text_features()
        logits = self.logits(first, texts)
        return self.blend(logits, self.logits(second, texts)) if self.learner.uses_both else logits


class RepresentationTrainer(EncoderTrainer):
    """Train tokens in the later layers of both encoders."""

    network: RepresentationClassifier
    learner_class: type[Any]  # makes the learner of class list and settings
    model_name = "MultiModalRepresentationLearner"  # as published
    needs_transformer = FOR_TOKENS

    def build_network(
        self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]
    ) -> RepresentationClassifier:
        """Build CLIP with tokens."""
        learner = self.learner_class(clip, classnames, self.settings)
        return RepresentationClassifier(clip, classnames, templates, learner, self.settings)

    def run(self, inputs: Any, labels: Tensor) -> RepresentationOutputs:
        """Return logits and features of a step; see RepresentationOutputs."""
        return self.network.outputs(inputs)

    def shown_logits(self, outputs: RepresentationOutputs) -> Tensor:
        """Return the logits [B, C] of both heads."""
        return self.network.blend(outputs.logits, outputs.second)

    def loss(self, outputs: RepresentationOutputs, labels: Tensor) -> dict[str, Tensor]:
        """Return the weighted losses of both heads, and the weighted distances from the frozen CLIP."""
        settings, texts = self.settings, self.network.zeroshot
        return {
            "ce": settings.alpha * self.class_loss(outputs.logits, labels),
            "tokens": (1 - settings.alpha) * self.class_loss(outputs.second, labels),
            "image": settings.reg_weight * (1 - F.cosine_similarity(outputs.images, outputs.frozen).mean()),
            "text": settings.reg_weight * (1 - F.cosine_similarity(outputs.texts, texts).mean()),
        }

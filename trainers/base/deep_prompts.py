"""Share what methods have in common that learn tokens in front of several blocks of both encoders (MaPLe and others).

Text tokens stand behind the start of text and are the same in all prompts, so that prompts go on sharing what is
computed of their beginning. Image tokens stand behind the patches, from the first block on: of the image tower nothing
but the stem is frozen.

Legend: B images, C classes, n tokens in front of a block, D width of the text encoder, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..clip import CLIP, BlockEdit
from ..clip.text import count_tokens
from ..features.kept_views import FrozenPart
from ..modules.context_prompts import ContextPrompts
from ..modules.deep_prompts import BackTokens, Context, FrontTokens, IndependentTokens, MappedTokens
from .encoder_trainer import EncoderTrainer
from .keys import MethodConfig, key, precision
from .learner import Classifier, Learner
from .prompts import initial_context

FOR_TOKENS = "which puts tokens in front of the image encoder's blocks"  # why a ResNet will not do


def token_count(default: int, whose: str, **limits: Any) -> Any:
    """Return the field for the number of tokens in front of a block of one or both encoders."""
    return key(default, f"number of {whose} in front of a block", low=1, **limits)


def token_depth(default: int, whose: str, low: int = 1, **limits: Any) -> Any:
    """Return the field for the number of blocks that have tokens of their own."""
    about = f"number of blocks of {whose}, from the first, that have tokens of their own; clipped to its depth"
    return key(default, about, low=low, **limits)


def first_words(default: str = "a photo of a") -> Any:
    """Return the field for the words that stand before the class name."""
    about = (
        "words before the class name; the first tokens start as the first of these words, the others stay; '': random"
    )
    return key(default, about, words=True)


def check_words(words: str, n: int, path: str, name: str = "N_CTX") -> None:
    """Refuse words that have fewer tokens than are learnt.

    Raises:
        ValueError: they have.
    """
    count = count_tokens([words.replace("_", " ")])[0] - 2
    if words and count < n:
        raise ValueError(
            f"Expected {path}.{name} to be at most {count}, the number of tokens of {path}.CTX_INIT {words!r}, "
            f"but got {n}; with CTX_INIT '' all start at random"
        )


@dataclass(frozen=True)
class MappedConfig(MethodConfig):
    """Settings of methods whose image tokens are made of text tokens."""

    n_ctx: int = token_count(2, "tokens, of texts and of images,")
    ctx_init: str = first_words()
    prec: str = precision("fp16")
    prompt_depth: int = token_depth(9, "both encoders")

    def check(self, path: str) -> None:
        """Check the first words against N_CTX; see MethodConfig."""
        check_words(self.ctx_init, self.n_ctx, path)


@dataclass(frozen=True)
class IndependentConfig(MethodConfig):
    """Settings of methods whose image and text tokens know nothing of each other."""

    n_ctx_vision: int = token_count(2, "image tokens")
    n_ctx_text: int = token_count(2, "text tokens")
    ctx_init: str = first_words()
    prec: str = precision("fp16")
    prompt_depth_vision: int = token_depth(9, "the image encoder")
    prompt_depth_text: int = token_depth(9, "the text encoder")

    def check(self, path: str) -> None:
        """Check the first words against N_CTX_TEXT; see MethodConfig."""
        check_words(self.ctx_init, self.n_ctx_text, path, "N_CTX_TEXT")


def first_context(clip: CLIP, n: int, words: str) -> tuple[Tensor, str]:
    """Return what the first block's text tokens start as, [n, D], and the words that stand before the class name.

    Args:
        clip: the frozen CLIP.
        n: number of tokens.
        words: the first n of their tokens are taken; "": normal draws with deviation 0.02 are.
    """
    context, words = initial_context(clip, n, words)
    return context[:n].clone(), words


class WholeModelLearner(Learner):
    """A learner whose published checkpoints hold all of CLIP, too; what is CLIP's is left out when they are loaded.

    The names in its state are the published ones, which begin with the part of the model that they belong to.
    """

    RECOMPUTED: tuple[str, ...] = ("prompt_learner.token_prefix", "prompt_learner.token_suffix", "logit_scale")
    # Beginnings of the names of CLIP's own weights in such checkpoints; "VPT" in a name means a token.
    CLIPS = ("image_encoder.", "text_encoder.", "prompt_learner.ZS_image_encoder.", "model_distill.")

    def take(self, state: Mapping[str, Tensor], indices: Sequence[int] | None = None) -> None:
        """Load a checkpoint's state; see Learner."""
        own = self.state_dict().keys()
        kept = (n for n in state if n in own or "VPT" in n or not n.startswith(self.CLIPS))
        super().take({name: state[name] for name in kept}, indices)


class ImageTokenLearner(WholeModelLearner):
    """Tokens in the image encoder.

    Args:
        clip: the frozen CLIP.
        classnames: class names in the order of their labels.
        words: what stands before the class name.
        method: who wants tokens, for messages.
    """

    def __init__(self, clip: CLIP, classnames: Sequence[str], words: str, method: str) -> None:
        facts = {"backbone": clip.name, "weights_digest": clip.weights_digest, "context": words}
        super().__init__(classnames, facts)
        clip.visual.check_edits([BackTokens({1: torch.zeros(1, 1)})], method)

    def image_tokens(self) -> dict[int, Tensor]:
        """Return the image tokens [n, D] of each block, by its number; those of the first are not normalized yet."""
        raise NotImplementedError


class DeepPromptLearner(ImageTokenLearner):
    """Tokens in both encoders.

    Args:
        clip: the frozen CLIP.
        classnames: class names in the order of their labels.
        n: text tokens in front of a block.
        words: what stands before the class name; its first n tokens are the learnt ones. "": n placeholders.
        method: who wants tokens, for messages.
    """

    prompt_learner: Context

    def __init__(self, clip: CLIP, classnames: Sequence[str], n: int, words: str, method: str) -> None:
        super().__init__(clip, classnames, words, method)
        self.prompts = ContextPrompts(clip.text, classnames, n, words)

    def text_tokens(self) -> dict[int, Tensor]:
        """Return the text tokens [n, D] of each block behind the first, by its number."""
        raise NotImplementedError


class IndependentLearner(DeepPromptLearner):
    """Text and image tokens that know nothing of each other. Names: `prompt_learner.ctx`, and see IndependentTokens.

    Args:
        clip, classnames: see DeepPromptLearner.
        n_text, n_image: tokens in front of a block.
        depth_text, depth_image: number of blocks that have tokens of their own; clipped to the encoder's depth.
        words: see first_context.
        method: see DeepPromptLearner.
    """

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        n_text: int,
        n_image: int,
        depth_text: int,
        depth_image: int,
        words: str,
        method: str,
    ) -> None:
        context, words = first_context(clip, n_text, words)
        super().__init__(clip, classnames, n_text, words, method)
        text, image = clip.text, clip.visual
        self.prompt_learner = Context(context)
        self.text_encoder = IndependentTokens(n_text, text.width, range(2, min(depth_text, text.depth) + 1))
        blocks = range(1, min(depth_image, image.depth) + 1)
        self.image_encoder = IndependentTokens(n_image, image.widths[1], blocks)

    @classmethod
    def of_settings(
        cls, clip: CLIP, classnames: Sequence[str], settings: IndependentConfig, method: str
    ) -> IndependentLearner:
        """Build the learner that a method's settings ask for."""
        numbers = settings.n_ctx_text, settings.n_ctx_vision, settings.prompt_depth_text, settings.prompt_depth_vision
        return cls(clip, classnames, *numbers, settings.ctx_init, method)

    def text_tokens(self) -> dict[int, Tensor]:
        """Return the text tokens of each block, which are learnt as they are; see DeepPromptLearner."""
        return self.text_encoder.by_block()

    def image_tokens(self) -> dict[int, Tensor]:
        """Return the image tokens of each block, which are learnt as they are; see DeepPromptLearner."""
        return self.image_encoder.by_block()


class MappedLearner(DeepPromptLearner):
    """Text tokens, and linear maps that make image tokens of them. For names see MappedTokens.

    Args:
        clip, classnames, method: see DeepPromptLearner.
        n: tokens in front of a block.
        depth: number of blocks that have tokens of their own; clipped to the depth of both encoders.
        words: see first_context.
    """

    prompt_learner: MappedTokens

    def __init__(self, clip: CLIP, classnames: Sequence[str], n: int, depth: int, words: str, method: str) -> None:
        context, words = first_context(clip, n, words)
        super().__init__(clip, classnames, n, words, method)
        depth = min(depth, clip.text.depth, clip.visual.depth)
        self.prompt_learner = MappedTokens(context, clip.visual.widths[1], depth)

    def text_tokens(self) -> dict[int, Tensor]:
        """Return the text tokens of the blocks behind the first; see DeepPromptLearner."""
        return self.prompt_learner.deeper_text()

    def image_tokens(self) -> dict[int, Tensor]:
        """Return the image tokens that the maps make of text tokens; see DeepPromptLearner."""
        return self.prompt_learner.image()


class DeepOutputs(NamedTuple):
    """Hold what a training step of tokens in both encoders computes.

    Attributes:
        logits: [B, C], with gradients.
        images: image features [B, E], normalized, fp32, with gradients.
        texts: text features [C, E], normalized, fp32, with gradients.
        part: the frozen part of the images.
    """

    logits: Tensor
    images: Tensor
    texts: Tensor
    part: FrozenPart


class DeepPromptClassifier(Classifier):
    """CLIP with learnt tokens in front of several blocks of both encoders."""

    learner: DeepPromptLearner

    def __init__(
        self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str], learner: ImageTokenLearner
    ) -> None:
        super().__init__(clip, classnames, templates, learner)
        if learner.image_tokens():
            self.first_adapted = 1

    def text_edits(self) -> list[BlockEdit]:
        """Return what puts the text tokens in front of the blocks behind the first."""
        tokens = self.learner.text_tokens()
        return [FrontTokens(tokens)] if tokens else []

    def image_edits(self) -> list[BlockEdit]:
        """Return what puts the image tokens in front of the blocks."""
        tokens = self.learner.image_tokens()
        return [BackTokens({**tokens, 1: self.clip.visual.normalize_tokens(tokens[1])})]

    def encode_texts(self) -> Tensor:
        """Encode the prompts: text features [C, E], not normalized, fp32."""
        text, learner = self.clip.text, self.learner
        state = learner.prompts.state(text, learner.prompt_learner.ctx)
        return text.suffix(state, 1, self.text_edits()).float()

    def encode_images(self, part: FrozenPart) -> Tensor:
        """Encode images with the learnt tokens: features [B, E], not normalized, fp32."""
        if part.hidden is None:
            assert part.features is not None
            return part.features
        return self.clip.visual.suffix(part.hidden, 1, self.image_edits()).float()

    @torch.no_grad()
    def frozen_images(self, part: FrozenPart) -> Tensor:
        """Return the features of the frozen CLIP [B, E], normalized, fp32."""
        features = part.features
        if features is None:
            assert part.hidden is not None
            features = self.clip.visual.suffix(part.hidden, 1)
        return F.normalize(features.float(), dim=-1)

    def compute_text(self) -> Tensor:
        """Compute the text features [C, E], normalized, fp32."""
        return F.normalize(self.encode_texts(), dim=-1)

    def outputs(self, images: Tensor | FrozenPart) -> DeepOutputs:
        """Return what a training step needs, for images [B, 3, H, W] or their frozen part."""
        part = images if isinstance(images, FrozenPart) else self.frozen_part(images)
        features, texts = F.normalize(self.encode_images(part), dim=-1), self.text_features()
        return DeepOutputs(self.logits(features, texts), features, texts, part)

    def classify(self, part: FrozenPart) -> Tensor:
        """Return logits [B, C] for the frozen part of images."""
        return self.logits(self.encode_images(part), self.text_features())


class DeepPromptTrainer(EncoderTrainer):
    """Train tokens in front of several blocks, by cross-entropy and what a subclass adds."""

    network: DeepPromptClassifier
    extra_keys = {}
    no_views = "whose tokens enter the first block of the image tower"
    needs_transformer = FOR_TOKENS

    def run(self, inputs: Any, labels: Tensor) -> DeepOutputs:
        """Return logits and features of a step; see DeepOutputs."""
        return self.network.outputs(inputs)

    def shown_logits(self, outputs: DeepOutputs) -> Tensor:
        """Return the logits [B, C]."""
        return outputs.logits

    def more_losses(self, outputs: DeepOutputs) -> dict[str, Tensor]:
        """Return the named losses that the method adds to cross-entropy; here none."""
        return {}

    def loss(self, outputs: DeepOutputs, labels: Tensor) -> dict[str, Tensor]:
        """Return the named losses: cross-entropy, and those of the method."""
        loss, terms = self.class_loss(outputs.logits, labels), self.more_losses(outputs)
        return {"ce": loss, **terms} if terms else {"loss": loss}

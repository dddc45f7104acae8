"""TCP: of each class's text feature, a small network makes the tokens that replace the context inside the encoder.

Yao et al., TCP: Textual-based Class-aware Prompt tuning for Visual-Language Model, 2024. With w_i the text feature of
zero-shot CLIP for class i, the n context vectors are replaced, before block LAYER of the text encoder, by

    reshape(W_2 quickgelu(W_1 w_i + b_1) + b_2)      E -> E / 4 -> n D

and text features are held near those of zero-shot CLIP:  loss = CE + W (1 - mean_i cos(t_i, w_i)).

What prompt methods share is in base/prompts.py. Up to block LAYER prompts share their common beginning; behind it they
have nothing in common.

Legend: C classes, n context vectors, L tokens, D width of the text encoder, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

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
from .clip.edits import BlockEdit

REDUCTION = 4  # hidden width of the network: E / 4


class ClassTokens(BlockEdit):
    """Put tokens of each class in the place of the context.

    Args:
        layer: the block before which it is done.
        tokens: [C, n, D].
    """

    def __init__(self, layer: int, tokens: Tensor) -> None:
        self.first_block = layer
        self._tokens = tokens

    def tokens(self, number: int, x: Tensor) -> Tensor:
        """Put the classes' tokens in the place of the context in x [C, L, D]; see BlockEdit."""
        if number != self.first_block:
            return x
        return torch.cat([x[:, :1], self._tokens.to(x.dtype), x[:, 1 + self._tokens.shape[1] :]], dim=1)


class TCPLearner(PromptLearner):
    """The context vectors and the network. The names in its state are the published ones.

    Args:
        clip, classnames: see PromptLearner.
        settings: see TCPConfig.
        rest: what follows the vectors, with {} for the class name.
    """

    def __init__(self, clip: CLIP, classnames: Sequence[str], settings: TCPConfig, rest: str) -> None:
        context, words = initial_context(clip, settings.n_ctx, settings.ctx_init)
        super().__init__(clip, classnames, context, words, rest=rest, dept=settings.dept)
        self.layer = min(settings.layer, clip.text.depth)
        self.facts["layer"] = self.layer
        hidden = max(1, clip.embed_dim // REDUCTION)
        self.meta_net = nn.ModuleDict(
            {
                "linear1": nn.Linear(clip.embed_dim, hidden),
                "linear2": nn.Linear(hidden, self.ctx.shape[0] * clip.text.width),
            }
        )

    def class_tokens(self, texts: Tensor) -> Tensor:
        """Return the tokens [C, n, D] for normalized text features [C, E], in fp32 even under autocast."""
        with torch.autocast(device_type=texts.device.type, enabled=False):
            hidden = self.meta_net["linear1"](texts.float())
            tokens = self.meta_net["linear2"](hidden * torch.sigmoid(1.702 * hidden))
        return tokens.unflatten(1, self.ctx.shape)


class TCPClassifier(PromptClassifier):
    """CLIP with prompts whose inner tokens follow from the class."""

    learner: TCPLearner

    def encode_texts(self) -> Tensor:
        """Return text features with the classes' tokens inserted; see PromptClassifier."""
        text, learner = self.clip.text, self.learner
        edit = ClassTokens(learner.layer, learner.class_tokens(self.zeroshot))
        return text.suffix(learner.prompts.state(text, learner.ctx), 1, [edit]).float()


@dataclass(frozen=True)
class TCPConfig(MethodConfig):
    """Settings of TCP; defaults as in its experiments."""

    n_ctx: int = key(4, "number of context vectors; with CTX_INIT its number of tokens counts", low=1)
    ctx_init: str = key("", "words that the context starts as, such as 'a photo of a'; '': random", words=True)
    layer: int = key(
        9,
        "block of the text encoder, from 1, before which the class's tokens replace the context; clipped to its depth",
        low=1,
        source="9; it counts from 0",
    )
    rest: str = key(
        "",
        "what follows the vectors, such as '{}, a type of pet.'; '': the dataset's template from the class name on",
        source="on most datasets '{}.'; see below",
    )
    w: float = key(8.0, "weight of the distance to zero-shot CLIP's text features", low=0)
    prec: str = precision("fp16", "what is learnt is kept in fp32")
    dept: DePTKeys = field(default_factory=DePTKeys)

    def check(self, path: str) -> None:
        """Check the words of REST; see MethodConfig."""
        if self.rest and self.rest.count("{}") != 1:
            raise ValueError(f"Expected {path}.REST to be '' or text with one {{}} but got {self.rest!r}")


@TRAINER_REGISTRY.register()
class TCP(PromptTrainer):
    """Textual-based class-aware prompt tuning."""

    paper = "Yao et al. 2024"
    learns = "context vectors, and a network that makes inner tokens of a class's text"
    config = TCPConfig

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> TCPClassifier:
        """Build CLIP with a prompt learner."""
        rest = self.settings.rest or "{}" + templates[0].partition("{}")[2]
        return TCPClassifier(clip, classnames, templates, TCPLearner(clip, classnames, self.settings, rest))

    def more_losses(self, outputs: PromptOutputs) -> dict[str, Tensor]:
        """Return W times the mean cosine distance of text features to those of zero-shot CLIP."""
        return {"kg": self.settings.w * distance_to(self.network.zeroshot, outputs.texts)}

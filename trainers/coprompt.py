"""CoPrompt: MaPLe's tokens and a bottleneck behind both encoders, held near the frozen CLIP on other views and texts.

Roy and Etemad, Consistency-guided Prompt Learning for Vision-Language Models, 2024. With x, y what the encoders with
MaPLe's tokens give, and a, b bottlenecks E -> E / 4 -> E with ReLU behind both matrices:

    f = normalize(0.1 a(x) + 0.9 x)        t = normalize(0.2 b(y) + 0.8 y)
    loss = CE + W [(1 - mean cos(f, f')) + (1 - mean cos(t, t'))]

f' is the frozen CLIP's feature of another view of the image (DATALOADER.K_TRANSFORMS 2), t' that of a sentence about
the class, drawn for each step (DATASET.DESCRIPTIONS).

What methods with tokens in both encoders share is in base/deep_prompts.py. Legend: B images, C classes, E width of the
joint embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import key
from .base.deep_prompts import (
    DeepOutputs,
    DeepPromptClassifier,
    DeepPromptTrainer,
    MappedConfig,
    MappedLearner,
    token_count,
    token_depth,
)
from .clip import CLIP, fill_template, sentence_features, sentences_of
from .features import FrozenPart

REDUCTION = 4  # hidden width of a bottleneck: E / 4


class Bottleneck(nn.Module):
    """The bottleneck relu(W_2 relu(W_1 x)), E -> E / 4 -> E, mixed with x; names in its state are the published ones.

    Args:
        width: E.
        share: of the bottleneck in the mixture.
    """

    def __init__(self, width: int, share: float) -> None:
        super().__init__()
        hidden = max(1, width // REDUCTION)
        layers = nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False), nn.ReLU()
        self.fc = nn.Sequential(*layers)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixture [..., E] for features x [..., E], in fp32 even under autocast."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            return self.share * self.fc(x.float()) + (1 - self.share) * x.float()


class CoPromptLearner(MappedLearner):
    """MaPLe's tokens and the two bottlenecks. Names: those of MappedTokens, `adapter_image`, `adapter_text`.

    Args:
        clip: the frozen CLIP.
        classnames: class names in the order of their labels.
        settings: see CoPromptConfig.
    """

    def __init__(self, clip: CLIP, classnames: Sequence[str], settings: CoPromptConfig) -> None:
        super().__init__(clip, classnames, settings.n_ctx, settings.prompt_depth, settings.ctx_init, "CoPrompt")
        self.facts |= {"image_share": settings.image_share, "text_share": settings.text_share}
        self.adapter_image = Bottleneck(clip.embed_dim, settings.image_share)
        self.adapter_text = Bottleneck(clip.embed_dim, settings.text_share)


class CoPromptClassifier(DeepPromptClassifier):
    """CLIP with tokens in both encoders and bottlenecks behind them, and frozen features of the classes' sentences."""

    learner: CoPromptLearner
    sentences: Tensor  # [M, E], normalized, class by class
    counts: Tensor  # [C], sentences of each class

    def __init__(
        self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str], learner: CoPromptLearner
    ) -> None:
        super().__init__(clip, classnames, templates, learner)
        described = sentences_of(templates, classnames)
        described = described or [[fill_template(one, name) for one in templates] for name in classnames]
        features, _ = sentence_features(clip, described)
        self.register_buffer("sentences", F.normalize(features, dim=-1), persistent=False)
        counts = torch.tensor([len(texts) for texts in described], device=features.device)
        self.register_buffer("counts", counts, persistent=False)

    def encode_texts(self) -> Tensor:
        """Return text features behind the text bottleneck; see DeepPromptClassifier."""
        return self.learner.adapter_text(super().encode_texts())

    def encode_images(self, part: FrozenPart) -> Tensor:
        """Return image features behind the image bottleneck; see DeepPromptClassifier."""
        return self.learner.adapter_image(super().encode_images(part))

    def sentence_of_each(self, place: float) -> Tensor:
        """Return the feature of one sentence of each class, [C, E].

        Args:
            place: at least 0 and below 1; sentence floor(place * number of the class's sentences) is taken.
        """
        ends = self.counts.cumsum(dim=0)
        return self.sentences[ends - self.counts + (place * self.counts.double()).long()]


@dataclass(frozen=True)
class CoPromptConfig(MappedConfig):
    """Settings of CoPrompt; keys and defaults as published where it has them."""

    n_ctx: int = token_count(2, "tokens, of texts and of images,", source="2 or 4, by dataset")
    prompt_depth: int = token_depth(9, "both encoders", source="9 or 12, by dataset")
    w: float = key(1.0, "weight of the distances from the frozen CLIP", low=0, source="0.1 to 10, by dataset")
    image_share: float = key(0.1, "share of the bottleneck in image features", low=0, high=1)
    text_share: float = key(0.2, "share of the bottleneck in text features", low=0, high=1)


@TRAINER_REGISTRY.register()
class CoPrompt(DeepPromptTrainer):
    """Consistency-guided prompt learning."""

    paper = "Roy and Etemad 2024"
    learns = "MaPLe's tokens, and bottlenecks behind both encoders"
    config = CoPromptConfig
    model_name = "MultiModalPromptLearner"  # as published
    main_head = "coprompt"
    network: CoPromptClassifier
    _frozen: Tensor  # frozen features [B, E] of this step's other views, normalized

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> CoPromptClassifier:
        """Build CLIP with tokens and bottlenecks."""
        learner = CoPromptLearner(clip, classnames, self.settings)
        return CoPromptClassifier(clip, classnames, templates, learner)

    def parse_batch_train(self, batch: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """Take two views of the images, [B, 3, H, W] each, or the same twice where there is one, and the labels [B]."""
        views, labels = batch["img"], batch["label"].to(self.device, non_blocking=True)
        views = views[:2] if isinstance(views, (list, tuple)) else [views]
        first, *others = (view.to(self.device, non_blocking=True) for view in views)
        return (first, others[0] if others else first), labels

    def run(self, inputs: tuple[Tensor, Tensor], labels: Tensor) -> DeepOutputs:
        """Compute a step's outputs for the first views, and the frozen features of the others."""
        outputs = super().run(inputs[0], labels)
        other = outputs.part if inputs[1] is inputs[0] else self.network.frozen_part(inputs[1])
        self._frozen = self.network.frozen_images(other)
        return outputs

    def more_losses(self, outputs: DeepOutputs) -> dict[str, Tensor]:
        """Return W times the mean cosine distances of images and texts from frozen features."""
        w, texts = self.settings.w, self.network.sentence_of_each(self._draw())
        return {
            "image": w * (1 - F.cosine_similarity(outputs.images, self._frozen).mean()),
            "text": w * (1 - F.cosine_similarity(outputs.texts, texts).mean()),
        }

    def _draw(self) -> float:
        """Draw a number in [0, 1), by seed and step: the same in all processes, and in a resumed run."""
        step = self.epoch * self.num_batches + self.batch_idx
        generator = torch.Generator().manual_seed(self.step_seed(step))
        return float(torch.rand((), generator=generator, dtype=torch.float64))

"""Cross-modal linear probe: class names are one more kind of training example.

Lin et al., Multimodality Helps Unimodality: Cross-Modal Few-Shot Learning with Multimodal Models, 2023. One linear
classifier is trained on unit-length features of images and of class prompts; every batch is half images, half prompts.
The classifier starts as the prompts' features and keeps CLIP's temperature. With FLIP each image is used twice: as it
is at test time, and mirrored.

Legend: B images (and as many prompts) in a batch, T templates, C classes, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import CorrectedKeys, FeatureLearner, FeatureTrainer, MethodConfig, kept_views, key
from .clip import CLIP, IMAGENET_TEMPLATES_SELECT, zeroshot_weights
from .clip.templates import ensemble_templates, prompt_features


class Outputs(NamedTuple):
    """Logits [2B, C] of a batch of images and, behind them, of as many prompts, and the labels of the prompts [B]."""

    logits: Tensor
    text_labels: Tensor


def text_rows(total: int, n: int, seed: int, step: int) -> Tensor:
    """Draw the rows [n] of `total` prompts in the batch of a step; see `CrossModalProbe.sample_texts`."""
    batches = max(1, total // n)  # in a pass
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step // batches)
    if total < n:
        return torch.randint(total, (n,), generator=generator)
    first = step % batches * n
    return torch.randperm(total, generator=generator)[first : first + n]


class CrossModalLearner(FeatureLearner):
    """A linear classifier, with logits s f weight^T, that starts as the text weights `start` [C, E]."""

    CLASS_ROWS = ("weight",)

    def __init__(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, start: Tensor) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.weight = nn.Parameter(start.clone())

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E]."""
        return self.scale * self.compared(features) @ self.weight.t()


@dataclass(frozen=True)
class CrossModalConfig(MethodConfig):
    """Settings of the cross-modal probe."""

    views: int = kept_views(0)
    flip: bool = key(
        False,
        "a mirrored view of each training image beside it, as an example of its own; only with VIEWS 0",
        source="in its published runs, and not where a mirrored object is another one",
    )
    templates: str = key(
        "dataset", "prompts: those of the dataset, or with ImageNet's seven (select)", choices=("dataset", "select")
    )
    steps: int = key(
        50, "steps in an epoch, after which TEST.FINAL_MODEL best_val looks at validation; 0: one pass", low=0
    )

    def check(self, path: str) -> None:
        """Check that views are not mirrored twice; see MethodConfig."""
        if self.flip and self.views:
            raise ValueError(
                f"Expected {path}.VIEWS to be 0 where .FLIP is True, which mirrors images as they are at test time, "
                f"but got {self.views!r}"
            )


@TRAINER_REGISTRY.register()
class CrossModalProbe(FeatureTrainer):
    """A linear classifier trained on image and text features."""

    recipe = 2
    node_name = "CROSSMODAL"
    paper = "Lin et al. 2023"
    learns = "a linear classifier on image and text features"
    config = CrossModalConfig
    extra_keys = {"MODEL": CorrectedKeys}
    model_name = "cross_modal"
    main_head = "probe"
    of_each_class = "weights"
    adapters = "optional"
    imagenet_templates = IMAGENET_TEMPLATES_SELECT
    raw_mean = True

    @property
    def mirror(self) -> bool:  # type: ignore[override]  # read from the configuration, never set
        """Train on mirrored images, too, where the setting FLIP is True; see FeatureTrainer."""
        return bool(self.settings.flip)

    def epoch_steps(self) -> int:
        """Return the setting STEPS."""
        return self.settings.steps

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the classifier, and keep the features of the prompts beside it."""
        own = self.templates()
        templates = own if self.settings.templates == "dataset" else ensemble_templates(own, "select", "")
        self.texts, self.text_labels = prompt_features(clip, classnames, templates)
        start = zeroshot_weights(clip, classnames, templates, self.raw_mean)
        return CrossModalLearner(clip, classnames, zeroshot, F.normalize(start, dim=-1))

    def sample_texts(self, n: int) -> tuple[Tensor, Tensor]:
        """Draw features [n, E] of n prompts and their labels [n], by seed and step.

        The draws run through all prompts pass after pass, each pass in an order of its own, and leave out the last,
        smaller batch of a pass. Where there are fewer than n prompts, they are drawn with repetitions.
        """
        step = self.epoch * len(self.train_loader_x) + self.batch_idx
        rows = text_rows(len(self.texts), n, self._seed, step).to(self.texts.device)
        return self.texts[rows], self.text_labels[rows]

    def run(self, inputs: Tensor, labels: Tensor) -> Outputs:
        """Classify the images and as many prompts, in one pass."""
        texts, text_labels = self.sample_texts(len(labels))
        images = self.network.learner.compared(self.network.features(inputs))
        return Outputs(self.network(torch.cat([images, texts])), text_labels)

    def loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Return the cross-entropy over images and prompts together."""
        return {"loss": self.class_loss(outputs.logits, torch.cat([labels, outputs.text_labels]))}

    def shown_logits(self, outputs: Outputs) -> Tensor:
        """Return the logits of the images."""
        return outputs.logits[: len(outputs.text_labels)]

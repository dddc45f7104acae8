"""Cross-modal linear probe: class names are one more kind of training example.

Lin et al., Multimodality Helps Unimodality: Cross-Modal Few-Shot Learning with Multimodal Models, 2023. One linear
classifier on features of unit length, of images and of class prompts; every batch is half images, half prompts. It
starts as the prompts' features and keeps CLIP's temperature. With FLIP each image is there twice, as it is at test time
and mirrored.

Legend: B images (and as many prompts) in a batch, T templates, C classes, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import FeatureLearner, FeatureTrainer, check_bool, check_choice, check_whole
from .clip import CLIP, IMAGENET_TEMPLATES_SELECT, zeroshot_weights
from .clip.templates import ensemble_templates
from .features.corrected import add_imo_weights


def cross_modal_loss(image_logits: Tensor, image_labels: Tensor, text_logits: Tensor, text_labels: Tensor) -> Tensor:
    """Cross-entropy over the union of image and text examples: [B, C], [B], [B, C], [B]."""
    return F.cross_entropy(torch.cat([image_logits, text_logits]), torch.cat([image_labels, text_labels]))


def text_rows(total: int, n: int, seed: int, step: int) -> Tensor:
    """Rows [n] of `total` prompts in the batch of a step: see `CrossModalProbe.sample_texts`."""
    batches = max(1, total // n)  # of a pass
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step // batches)
    if total < n:
        return torch.randint(total, (n,), generator=generator)
    first = step % batches * n
    return torch.randperm(total, generator=generator)[first : first + n]


class CrossModalLearner(FeatureLearner):
    """A linear classifier that starts as the zero-shot weights: s f weight^T."""

    CLASS_ROWS = ("weight",)

    def __init__(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, start: Tensor) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.weight = nn.Parameter(start.clone())

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, E] -> logits [B, C]."""
        return self.scale * self.compared(features) @ self.weight.t()


@TRAINER_REGISTRY.register()
class CrossModalProbe(FeatureTrainer):
    """A linear classifier trained on image and text features."""

    recipe = 2
    node_name = "CROSSMODAL"
    model_name = "cross_modal"
    main_head = "probe"
    of_each_class = "weights"
    adapters = "optional"
    imagenet_templates = IMAGENET_TEMPLATES_SELECT
    raw_mean = True

    @property
    def mirror(self) -> bool:  # type: ignore[override]  # read from the configuration, never set
        """See FeatureTrainer: FLIP."""
        return bool(self.node.FLIP)

    @staticmethod
    def add_config(cfg: Any) -> None:
        """Adds TRAINER.CROSSMODAL and MODEL.IMO_WEIGHTS to `cfg` unless they are there."""
        add_imo_weights(cfg)
        if "CROSSMODAL" in cfg.TRAINER:
            return
        node = FeatureTrainer.new_node(cfg, views=0)
        # A mirrored view of each training image beside it, as an example of its own; only with VIEWS 0 (source: in its
        # published runs, and not where a mirrored object is another one).
        node.FLIP = False
        node.TEMPLATES = "dataset"  # prompts: dataset (its own template) | select (with ImageNet's seven)
        node.STEPS = 50  # steps in an epoch, after which TEST.FINAL_MODEL best_val looks at validation; 0: one pass
        cfg.TRAINER.CROSSMODAL = node

    def check_node(self, cfg: Any) -> None:
        """See LearnerTrainer."""
        check_choice(cfg, "TRAINER.CROSSMODAL.TEMPLATES", ("dataset", "select"))
        check_whole(cfg, "TRAINER.CROSSMODAL.STEPS", 0)
        check_bool(cfg, "TRAINER.CROSSMODAL.FLIP")
        if cfg.TRAINER.CROSSMODAL.FLIP and cfg.TRAINER.CROSSMODAL.VIEWS:
            raise ValueError(
                "Expected TRAINER.CROSSMODAL.VIEWS to be 0 where .FLIP is True, which mirrors images as they are at "
                f"test time, but got {cfg.TRAINER.CROSSMODAL.VIEWS!r}"
            )

    def epoch_steps(self) -> int:
        """STEPS."""
        return self.node.STEPS

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """The classifier; the features of the prompts are kept beside it."""
        own = self.templates()
        templates = own if self.node.TEMPLATES == "dataset" else ensemble_templates(own, "select", "")
        texts = torch.stack([zeroshot_weights(clip, classnames, [template]) for template in templates])
        self.texts = texts.flatten(0, 1)  # [T * C, E]
        start = zeroshot_weights(clip, classnames, templates, self.raw_mean)
        return CrossModalLearner(clip, classnames, zeroshot, F.normalize(start, dim=-1))

    def sample_texts(self, n: int) -> tuple[Tensor, Tensor]:
        """n features [n, E] of prompts and their labels [n], drawn by seed and step.

        Pass after pass over all prompts, each in an order of its own, without the last, smaller batch of a pass; where
        there are fewer than n prompts, with repetitions.
        """
        step = self.epoch * len(self.train_loader_x) + self.batch_idx
        rows = text_rows(len(self.texts), n, self._seed, step).to(self.texts.device)
        return self.texts[rows], rows % len(self.network.learner.classnames)

    def loss(self, features: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """See FeatureTrainer: over the images and as many prompts."""
        texts, text_labels = self.sample_texts(len(labels))
        logits = self.network(features)
        return {"loss": cross_modal_loss(logits, labels, self.network(texts), text_labels)}, logits

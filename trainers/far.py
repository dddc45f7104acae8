"""FAR: an adapter behind CLIP's image encoder, a classifier of its own on it, and a fusion with zero-shot CLIP.

Feature Adaptation with CLIP for Few-shot Classification, ACM Multimedia Asia 2023, and its code (WideStars/FAR).

    x' = (1 - r) x + r relu(BN(A x))      g = x' W_0 + b      own = B relu(BN(D g))
    logits = beta own + (1 - beta) s f T^T
    loss = cross-entropy(own) + GAMMA |own - s f T^T|_1 - DELTA KL(softmax(f) || softmax(g))

x are the features before CLIP's last projection W_0, f those after it, of unit length; g keeps its length. b belongs
to ResNets only. T are the zero-shot weights. The L1 distance, a mean over images and classes, holds the classifier near
CLIP. The divergence is subtracted: it drives the adapted features away from CLIP's. beta is chosen on validation
images.

Legend: B images, C classes, P width of x, E width of the joint embedding, H width of the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import FeatureLearner, FeatureTrainer, MethodConfig, PooledLearner, kept_views, key
from .base.search import Axis, best_place
from .clip import CLIP, IMAGENET_TEMPLATES_SELECT

BETAS = Axis(0.0, 1.0, 51, closed=True)


class Outputs(NamedTuple):
    """The classifier's own logits and those of zero-shot CLIP, [B, C]; f and g, [B, E]."""

    own: Tensor
    clip_logits: Tensor
    plain: Tensor
    adapted: Tensor


def normed(norm: nn.BatchNorm1d, rows: Tensor) -> Tensor:
    """Return rows through a BatchNorm; a row that is alone in training has no variance, and takes the running one."""
    if norm.training and len(rows) < 2:
        return F.batch_norm(rows, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return norm(rows)


class FARLearner(PooledLearner):
    """The adapter, the classifier, and beta.

    Args:
        ratio: r, the share of the adapted feature.
        hidden: H.
        beta: share of the classifier until another is chosen.
    """

    CLASS_ROWS = ("classifier.weight",)

    beta: Tensor

    def __init__(
        self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, *, ratio: float, hidden: int, beta: float
    ) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.ratio = ratio
        width, embed = self.start.shape
        self.adapter, self.adapter_norm = nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)
        self.hidden, self.hidden_norm = nn.Linear(embed, hidden, bias=False), nn.BatchNorm1d(hidden)
        self.classifier = nn.Linear(hidden, len(classnames), bias=False)
        self.keep_number("beta", beta)

    def adapted(self, features: Tensor) -> Tensor:
        """Return g [B, E] for features [B, P]."""
        moved = F.relu(normed(self.adapter_norm, self.adapter(features)))
        return self.project((1 - self.ratio) * features + self.ratio * moved)

    def outputs(self, features: Tensor) -> Outputs:
        """Return all that the loss needs, for features [B, P]."""
        plain, adapted = self.original(features), self.adapted(features)
        own = self.classifier(F.relu(normed(self.hidden_norm, self.hidden(adapted))))
        return Outputs(own, self.scale * plain @ self.zeroshot.t(), plain, adapted)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, P]."""
        outputs, beta = self.outputs(features), self.peek("beta", self.beta)
        return beta * outputs.own + (1 - beta) * outputs.clip_logits


@dataclass(frozen=True)
class FARConfig(MethodConfig):
    """Settings of FAR."""

    views: int = kept_views(10, source="fresh ones")
    ratio: float = key(0.2, "r, share of the adapted feature", above=0, high=1, source="0.2")
    hidden: int = key(2048, "H, width of the classifier's hidden layer", low=1, source="2048")
    gamma: float = key(0.3, "weight of the distance from CLIP's logits", low=0, source="0.3")
    delta: float = key(0.01, "weight of the divergence from CLIP's features, which is made large", low=0, source="0.01")
    beta: float = key(
        0.5,
        "share of the classifier where it cannot be chosen: no validation images",
        low=0,
        high=1,
        source="none: always chosen",
    )


@TRAINER_REGISTRY.register()
class FAR(FeatureTrainer):
    """An adapter and a classifier on CLIP's image features, fused with zero-shot CLIP."""

    paper = "FAR, MM Asia 2023"
    learns = "an adapter of image features, and a classifier with one hidden layer"
    config = FARConfig
    imagenet_templates = IMAGENET_TEMPLATES_SELECT
    of_each_class = "weights"
    drop_last = False
    projected = False
    eps = 1e-4
    network: Any

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the adapter and the classifier, which start at random."""
        settings = self.settings
        return FARLearner(clip, classnames, zeroshot, ratio=settings.ratio, hidden=settings.hidden, beta=settings.beta)

    def run(self, inputs: Tensor, labels: Tensor) -> Outputs:
        """Return all that the loss needs."""
        return self.network.learner.outputs(inputs)

    def loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Return the cross-entropy of the classifier, its distance from CLIP, and the negative divergence."""
        settings = self.settings
        divergence = F.kl_div(outputs.adapted.log_softmax(dim=-1), outputs.plain.softmax(dim=-1), reduction="batchmean")
        return {
            "loss_ce": self.class_loss(outputs.own, labels),
            "loss_l1": settings.gamma * F.l1_loss(outputs.own, outputs.clip_logits),
            "loss_kl": -settings.delta * divergence,
        }

    def shown_logits(self, outputs: Outputs) -> Tensor:
        """Return the classifier's own logits [B, C]."""
        return outputs.own

    def choose(self) -> None:
        """Choose beta by the accuracy on validation images, the least of equals; without any, TRAINER.FAR.BETA."""
        learner, known = self.network.learner, self.validation_features()
        if isinstance(known, str):
            beta = self.settings.beta
            self.note({"beta": beta}, f"TRAINER.FAR.BETA ({known})", 0)
        else:
            training = learner.training
            learner.eval()
            outputs, betas = learner.outputs(known[0]), BETAS.values()
            learner.train(training)
            hits = [
                ((beta * outputs.own + (1 - beta) * outputs.clip_logits).argmax(dim=1) == known[1]).double().mean()
                for beta in betas
            ]
            accuracy = 100 * torch.stack(hits)
            beta = betas[best_place(accuracy)[0]]
            self.write_scalar(f"val/{self.main_head}_at_choice", float(accuracy.max()), self.epoch)
            self.note({"beta": beta}, "val", len(known[1]))
        learner.beta.fill_(beta)

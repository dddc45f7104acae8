"""DeIL's direct head: a small classifier on CLIP's image features beside zero-shot CLIP, for labels that may be wrong.

Shao et al., DeIL: Direct-and-Inverse CLIP for Open-World Few-Shot Learning, 2024. The source asks three outside models:
CLIPN which labels are wrong, GPT-3 for sentences of the classes, DALL-E for images. This is the form without them:
labels are cleaned by DATASET.CLEANING, and a second view of an image stands in the place of a generated image.

    h = GELU(BN(A f))     z = Z(B h)     logits = s f W^T + alpha exp(-beta (1 - z))

W are the zero-shot weights; A [E, E] and B [C, E] are learnt. Z subtracts the mean over the classes and divides by the
standard deviation: the source's fusion of one classifier with itself comes to that.

    loss = cross-entropy(logits) + gamma InfoNCE(h, h')

h' belongs to another view of the same image; the negatives are images of other classes in the batch.

Legend: V views, N images, B images in a batch, C classes, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import FeatureLearner, FeatureTrainer, MethodConfig, kept_views, key
from .base.search import best_place
from .clip import CLIP
from .modules.standardized import standardized

TEMPERATURE = 0.1  # of InfoNCE
POINTS = 20  # of each axis of the grid
LEAST = 0.1  # where both axes begin


def deil_logits(clip_logits: Tensor, z: Tensor, alpha: Tensor | float, beta: Tensor | float) -> Tensor:
    """Return logits [B, C] of zero-shot logits and the head's own standardized ones, z, [B, C] each."""
    return clip_logits + alpha * torch.exp(-beta * (1 - z))


def info_nce(anchors: Tensor, positives: Tensor, labels: Tensor) -> Tensor:
    """Return the mean InfoNCE of hidden features [B, E] against those of other views of the same images [B, E].

    Other images with the same label are neither positive nor negative.
    """
    similar = F.normalize(anchors, dim=1) @ F.normalize(positives, dim=1).t() / TEMPERATURE
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    similar = similar.masked_fill((labels[:, None] == labels) & ~itself, -torch.inf)
    return F.cross_entropy(similar, torch.arange(len(labels), device=labels.device))


class DeILLearner(FeatureLearner):
    """The layers A, BN and B, and the two strengths.

    Args:
        alpha, beta: strength and sharpness of the head, until others are chosen.
    """

    CLASS_ROWS = ("classifier.weight",)

    alpha: Tensor
    beta: Tensor

    def __init__(
        self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, alpha: float = 1.0, beta: float = 0.5
    ) -> None:
        super().__init__(clip, classnames, zeroshot)
        width = zeroshot.shape[1]
        self.layer, self.norm = nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)
        self.classifier = nn.Linear(width, len(classnames), bias=False)
        for linear in (self.layer, self.classifier):
            nn.init.kaiming_normal_(linear.weight)
        self.given = (float(alpha), float(beta))  # what training uses, whatever has been chosen
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_buffer("beta", torch.tensor(float(beta)))

    def hidden(self, features: Tensor) -> Tensor:
        """Return h [B, E] for features [B, E]."""
        return F.gelu(self.norm(self.layer(features)))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E]."""
        return self.joined(features, self.hidden(features))

    def joined(self, features: Tensor, hidden: Tensor) -> Tensor:
        """Return logits [B, C] for features and their h, [B, E] each."""
        alpha, beta = self.given if self.training else (self.alpha, self.beta)
        return deil_logits(self.clip_logits(features), standardized(self.classifier(hidden)), alpha, beta)


@dataclass(frozen=True)
class DeILConfig(MethodConfig):
    """Settings of DeIL."""

    views: int = kept_views(10)
    alpha: float = key(1.0, "strength of the head beside zero-shot CLIP", low=0, source="0.3 to 2, by dataset")
    beta: float = key(0.5, "sharpness of the head", low=0, source="0.5 to 1, by dataset")
    gamma: float = key(0.1, "weight of InfoNCE; 0: none", low=0, source="0.1, and 0.01 on Caltech101")
    search: bool = key(
        True,
        "choose alpha and beta on validation images after training; without these they stay",
        source="on test images",
    )
    alpha_max: float = key(3.0, "end of the grid for alpha", above=LEAST, source="3 to 13, by dataset")
    beta_max: float = key(7.0, "end of the grid for beta", above=LEAST, source="7 to 13, by dataset")

    def check(self, path: str) -> None:
        """Check that there are two views to compare where they are compared; see MethodConfig."""
        if self.gamma and self.views < 2:
            raise ValueError(
                f"Expected {path}.VIEWS to be at least 2 with {path}.GAMMA above 0, which compares views, but got "
                f"{self.views}"
            )


@TRAINER_REGISTRY.register()
class DeIL(FeatureTrainer):
    """DeIL's direct head, trained by cross-entropy and InfoNCE over views."""

    paper = "Shao et al. 2024"
    learns = "a classifier with one hidden layer beside zero-shot CLIP"
    config = DeILConfig
    of_each_class = "weights"
    eps = 1e-4
    drop_last = True  # BatchNorm wants more than one image
    network: Any

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the head."""
        return DeILLearner(clip, classnames, zeroshot, self.settings.alpha, self.settings.beta)

    def parse_batch_train(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the features of two views [B, 2, E] and labels [B]; with gamma 0 or in tests of one view [B, E]."""
        features, labels = super().parse_batch_train(batch)
        known = self.train_features.all()
        if not self.settings.gamma or "index" not in batch:
            return features, labels
        other = known.values[(self.epoch + 1) % len(known.values), batch["index"]]
        return torch.stack([features, other.to(features)], dim=1), labels

    def run(self, inputs: Tensor, labels: Tensor) -> Any:
        """Return the logits [B, C] and, with two views, InfoNCE."""
        learner: DeILLearner = self.network.learner
        if inputs.ndim == 2:
            return learner(inputs), None
        # Both views pass at once, so that both are normalized alike.
        first, second = learner.hidden(inputs.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(dim=1)
        return learner.joined(inputs[:, 0], first), info_nce(first, second, labels)

    def loss(self, outputs: Any, labels: Tensor) -> dict[str, Tensor]:
        """Return cross-entropy (or what OPTIM.LOSS says), and gamma times InfoNCE."""
        logits, contrast = outputs
        terms = {"loss_ce": self.class_loss(logits, labels)}
        return terms if contrast is None else {**terms, "loss_nce": self.settings.gamma * contrast}

    def shown_logits(self, outputs: Any) -> Tensor:
        """Return the logits [B, C]."""
        return outputs[0]

    def choose(self) -> None:
        """Choose alpha and beta on validation images, of equals the weakest head."""
        settings, learner = self.settings, self.network.learner
        known = self.validation_features() if settings.search else "not searched"
        alpha, beta = settings.alpha, settings.beta
        if isinstance(known, str):
            self.note({"alpha": alpha, "beta": beta}, known, 0)
        else:
            training = learner.training
            learner.eval()
            features, labels = known
            clip_logits = learner.clip_logits(features)
            z = standardized(learner.classifier(learner.hidden(features)))
            grid = [torch.linspace(LEAST, end, POINTS).tolist() for end in (settings.alpha_max, settings.beta_max)]
            hits = torch.tensor(
                [
                    [int((deil_logits(clip_logits, z, a, b).argmax(dim=1) == labels).sum()) for b in grid[1]]
                    for a in grid[0]
                ]
            )
            row, column = best_place(hits)
            alpha, beta = grid[0][row], grid[1][column]
            self.note({"alpha": alpha, "beta": beta}, "val", len(labels))
            learner.train(training)
        learner.alpha.fill_(alpha)
        learner.beta.fill_(beta)

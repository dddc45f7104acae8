"""TIMO: texts weighed by images, and images joined by texts, in Gaussians with one covariance, in closed form.

Li et al., Text and Image Are Mutually Beneficial: Enhancing Training-Free Few-Shot Classification with CLIP, 2025.

    logits = alpha f T'^T + f W^T + b

T'_k is the normalized sum of the texts t of class k, each weighed by exp(g r / |r|). r is a text's agreement with the
mean of its class's training images, their cosine; |r| is the length of all r of the class. g is the sharpness, 50.

W and b are those of GDA (modules/gaussian.py), of the views of all training images and of the texts r t as further
samples. alpha is chosen in the source's grid on validation images, the least of equals.

TIMO-S (SEARCH) also chooses g, from 5 to 100 by the accuracy of f T'^T alone, and how many samples the texts give: the
best of each class, in two rounds at most.

Legend: V views, N images, B images in a batch, M texts of all classes, C classes, E width of the joint embedding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import FeatureLearner, FeatureTrainer, MethodConfig, kept_views, key
from .base.search import best_place
from .clip import CLIP, IMAGENET_TEMPLATES_SELECT
from .clip.templates import ensemble_templates, prompt_features
from .features import FeatureSet
from .modules.gaussian import class_counts, class_sums, linear, pooled_scatter, precision_matrix

logger = logging.getLogger(__name__)

ALPHAS = tuple(10.0**i for i in range(-4, 5))
SHARPNESSES = tuple(float(g) for g in range(5, 101, 5))  # TIMO-S
AMOUNTS = 10  # TIMO-S: how many numbers of texts are tried, from 1 to twice as many as there are


def agreement(texts: Tensor, text_labels: Tensor, features: FeatureSet, num_classes: int) -> Tensor:
    """Return the cosine of each text and the mean of its class's training images, [M], float64.

    An image is the normalized mean of its views, as CLIP gives them.

    Args:
        texts: [M, E], normalized. text_labels: [M].

    Raises:
        ValueError: a class has no image.
    """
    class_counts(features.labels, num_classes)
    images = F.normalize(features.mean().double(), dim=-1)
    means = F.normalize(class_sums(images, features.labels, num_classes), dim=-1)
    return (texts.double() * means[text_labels]).sum(dim=-1)


def weighed_texts(texts: Tensor, text_labels: Tensor, scores: Tensor, num_classes: int, sharpness: float) -> Tensor:
    """Return T' [C, E], float64, for texts [M, E] with labels [M] and agreements [M]."""
    lengths = class_sums(scores.square()[:, None], text_labels, num_classes).sqrt().clamp(min=1e-12)
    powers = sharpness * scores / lengths[text_labels, 0]
    most = powers.new_full((num_classes,), -math.inf).scatter_reduce(0, text_labels, powers, "amax")
    weights = torch.exp(powers - most[text_labels])  # their sum does not count: T' is normalized
    return F.normalize(class_sums(weights[:, None] * texts.double(), text_labels, num_classes), dim=-1)


def best_texts(text_labels: Tensor, scores: Tensor, amount: int) -> Tensor:
    """Return the rows of the `amount` best texts of each class, in two rounds over all of them at most.

    With `amount` 0: each text once.
    """
    if not amount:
        return torch.arange(len(scores), device=scores.device)
    order = scores.argsort(descending=True, stable=True)
    order = order[text_labels[order].argsort(stable=True)]  # class by class, the best first
    return torch.cat([rows.repeat(2)[:amount] for rows in order.split(text_labels.bincount().tolist())])


def fit_joined(features: FeatureSet, texts: Tensor, text_labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return W [C, E] and b + log(C) [C] of the Gaussians of all views and of texts [M, E] as further samples.

    Raises:
        ValueError: a class has no image.
    """
    values, labels, extra = features.values, features.labels, texts.double()
    counts = len(values) * class_counts(labels, num_classes) + text_labels.bincount(minlength=num_classes)
    sums = class_sums(values.sum(dim=0, dtype=torch.float64), labels, num_classes)
    means = (sums + class_sums(extra, text_labels, num_classes)) / counts[:, None]
    scatter = pooled_scatter(values, labels, means) + pooled_scatter(extra[None], text_labels, means)
    return linear(means, precision_matrix(scatter, int(counts.sum())))


class TIMOLearner(FeatureLearner):
    """The weighed texts T', the Gaussians as a linear classifier, and alpha, the weight of the texts.

    Args:
        alpha: value until another is chosen.
    """

    CLASS_ROWS = ("texts", "weight", "bias")

    texts: Tensor
    weight: Tensor
    bias: Tensor
    alpha: Tensor

    def __init__(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, *, alpha: float) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.register_buffer("texts", torch.zeros_like(self.zeroshot))
        self.register_buffer("weight", torch.zeros_like(self.zeroshot))
        self.register_buffer("bias", torch.zeros(len(zeroshot)))  # without log(1/C)
        self.keep_number("alpha", alpha)

    def parts(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the texts' logits without alpha, and the Gaussians', [B, C] each, for features [B, E]."""
        return features @ self.texts.t(), features @ self.weight.t() + (self.bias - math.log(len(self.bias)))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E]."""
        of_texts, of_gaussians = self.parts(features)
        return self.peek("alpha", self.alpha) * of_texts + of_gaussians


@dataclass(frozen=True)
class TIMOConfig(MethodConfig):
    """Settings of TIMO."""

    views: int = kept_views(10, source="10")
    texts: str = key(
        "select",
        "texts of a class: the prompts of zero-shot CLIP (dataset), these with ImageNet's seven (select) or with its "
        "eighty (all); DATASET.DESCRIPTIONS, where given, replaces them",
        choices=("dataset", "select", "all"),
        source="the dataset's templates and two files of sentences",
    )
    sharpness: float = key(50.0, "g, of the texts' weights", low=0, source="50; ImageNet: 1, OxfordFlowers: 100")
    alpha: float = key(
        10.0,
        "weight of the texts where it cannot be chosen: no validation images",
        low=0,
        source="0.1, where nothing in its grid is right once",
    )
    search: bool = key(
        False, "TIMO-S: also choose the sharpness and the number of texts on validation images", source="both forms"
    )


@TRAINER_REGISTRY.register()
class TIMO(FeatureTrainer):
    """Texts weighed by images beside Gaussians of images and texts, in closed form."""

    paper = "Li et al. 2025"
    learns = "weights of texts, class means and one covariance, in closed form"
    cross_entropy = False
    config = TIMOConfig
    imagenet_templates = IMAGENET_TEMPLATES_SELECT
    of_each_class = "Gaussians"

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the classifier, which is zero until the fit, and keep the features of all texts beside it."""
        prompts: Sequence[str] = self.templates()
        which = self.settings.texts
        if which != "dataset":
            prompts = ensemble_templates(prompts, which, self.cfg.DATASET.NAME)
        self.texts, self.text_labels = prompt_features(clip, classnames, prompts)
        if len(self.texts) == len(classnames):
            logger.warning(
                "TIMO weighs several texts of a class, but each class has one here: it is taken as it is. Texts come "
                "from DATASET.DESCRIPTIONS, a list in DATASET.TEMPLATE, or TRAINER.TIMO.TEXTS"
            )
        learner = TIMOLearner(clip, classnames, zeroshot, alpha=self.settings.alpha)
        self.fitted_parameters = learner.texts.numel() + learner.weight.numel() + learner.bias.numel()
        return learner

    def fit(self, features: FeatureSet) -> dict[str, float]:
        """Weigh the texts, fit the Gaussians, and return the number of samples."""
        self._fit(features, self._scores(features), self.settings.sharpness, 0)
        return {"samples": float(features.values[..., 0].numel() + len(self.texts))}

    def _scores(self, features: FeatureSet) -> Tensor:
        return agreement(self.texts, self.text_labels, features, self.num_classes)

    def _fit(self, features: FeatureSet, scores: Tensor, sharpness: float, amount: int) -> None:
        learner: Any = self.network.learner
        texts = weighed_texts(self.texts, self.text_labels, scores, self.num_classes, sharpness)
        rows = best_texts(self.text_labels, scores, amount)
        samples = scores[rows, None] * self.texts[rows]
        weight, bias = fit_joined(features, samples, self.text_labels[rows], self.num_classes)
        for name, value in (("texts", texts), ("weight", weight), ("bias", bias)):
            getattr(learner, name).copy_(value)

    def choose(self) -> None:
        """Choose alpha, and with SEARCH the sharpness and the number of texts, by the accuracy on validation images."""
        learner: Any = self.network.learner
        known, settings = self.validation_features(), self.settings
        if isinstance(known, str):
            learner.alpha.fill_(settings.alpha)
            self.note({"alpha": settings.alpha}, f"TRAINER.TIMO.ALPHA ({known})", 0)
            return
        chosen: dict[str, float] = {}
        if not settings.search:
            accuracy = self._accuracy(*known)
            (place,) = best_place(accuracy)
        else:
            features = self.train_features.all()
            scores = self._scores(features)
            sharpness = self._best_sharpness(*known, scores)
            most = 2 * int(self.text_labels.bincount().max())
            amounts = [int(amount) for amount in torch.linspace(1, most, AMOUNTS)]
            rows = []
            for amount in amounts:
                self._fit(features, scores, sharpness, amount)
                rows.append(self._accuracy(*known))
            accuracy = torch.stack(rows)
            amount_at, place = best_place(accuracy)
            self._fit(features, scores, sharpness, amounts[amount_at])
            chosen = {"sharpness": sharpness, "texts": float(amounts[amount_at])}
        learner.alpha.fill_(ALPHAS[place])
        self.write_scalar(f"val/{self.main_head}_at_choice", float(accuracy.max()), self.epoch)
        self.note({"alpha": ALPHAS[place], **chosen}, "val", len(known[1]))

    def _accuracy(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the accuracy (percent) under each alpha, [A]."""
        learner: Any = self.network.learner
        of_texts, of_gaussians = learner.parts(features)
        hits = [((alpha * of_texts + of_gaussians).argmax(dim=1) == labels).double().mean() for alpha in ALPHAS]
        return 100 * torch.stack(hits).cpu()

    def _best_sharpness(self, features: Tensor, labels: Tensor, scores: Tensor) -> float:
        rows = [weighed_texts(self.texts, self.text_labels, scores, self.num_classes, g) for g in SHARPNESSES]
        hits = [((features.double() @ texts.t()).argmax(dim=1) == labels).double().mean() for texts in rows]
        return SHARPNESSES[best_place(torch.stack(hits))[0]]

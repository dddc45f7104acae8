"""LP++: a linear probe beside zero-shot CLIP, with a weight of the text for each class.

Huang et al., LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP, 2024.

    logits_k = f w_k + b_k + alpha_k f t_k

t are the zero-shot weights. w, b and alpha descend along the cross-entropy, on all training images at once. Nothing is
searched: starting values and step sizes follow from the features, the steps from Lipschitz constants of the gradient.

    w_k = sum of the features of class k          alpha_k = 250 times the mean over the classes of the mean of f t_own
    step of w and b: 4n / (largest eigenvalue of F^T F), momentum 0.9
    step of alpha: n / (4 max_k sum_i (f_i t_k)^2), in each tenth epoch only

The source starts w as the sum, where one would expect the mean. It computes the gradient of alpha in each epoch and
never resets it, so that each step of alpha follows the sum of all gradients until then.

Legend: V views, N images, n = V N rows of F, C classes, E width of the joint embedding, B images in a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import FeatureLearner, FeatureTrainer, MethodConfig, kept_views, key
from .clip import CLIP, IMAGENET_TEMPLATES_SELECT
from .features import FeatureSet
from .log import DETAIL
from .modules.gaussian import class_counts, class_means

logger = logging.getLogger(__name__)

START = 250.0  # alpha at first, for a mean cosine of 1
MOMENTUM = 0.9
ALPHA_EVERY = 10  # epochs from one step of alpha to the next
NUMBERS_AT_ONCE = 2**26  # most numbers in the logits of the images that are classified at once


class Steps(NamedTuple):
    """The step sizes of w and b, and of alpha."""

    weight: float
    alpha: float


class Probe(NamedTuple):
    """The probe's weight w [C, E], bias b [C] and text weight alpha [C]; also gradients of the three."""

    weight: Tensor
    bias: Tensor
    alpha: Tensor


def start_probe(values: Tensor, labels: Tensor, zeroshot: Tensor) -> Probe:
    """Return the probe before the first step, in the precision of the zero-shot weights.

    Args:
        values: features [V, N, E] of images with labels [N].
        zeroshot: zero-shot weights [C, E].

    Raises:
        ValueError: a class has no image.
    """
    means = class_means(values, labels, len(zeroshot))
    sums = means * class_counts(labels, len(zeroshot))[:, None]  # over images, views averaged
    alpha = START * (means * zeroshot).sum(dim=1).mean()
    return Probe(sums.to(zeroshot), zeroshot.new_zeros(len(zeroshot)), alpha.to(zeroshot).repeat(len(zeroshot)))


def step_sizes(rows: Tensor, zeroshot: Tensor) -> Steps:
    """Return the step sizes for features [n, E] and zero-shot weights [C, E]."""
    width = rows.shape[1]
    gram = rows.new_zeros(width, width, dtype=torch.float64)
    for part in rows.split(max(1, NUMBERS_AT_ONCE // width)):
        gram += part.double().t() @ part.double()
    # sum_i (f_i t_k)^2 = t_k F^T F t_k^T
    squares = ((zeroshot.double() @ gram) * zeroshot.double()).sum(dim=1)
    largest = torch.linalg.eigvalsh(gram)[-1]
    return Steps(float(4 * len(rows) / largest), float(len(rows) / (4 * squares.max())))


def probe_logits(probe: Probe, features: Tensor, zeroshot: Tensor, cosines: Tensor | None = None) -> Tensor:
    """Return logits [B, C] for features [B, E] and zero-shot weights [C, E].

    Args:
        cosines: products of features and zero-shot weights [B, C], where they are known.
    """
    cosines = features @ zeroshot.t() if cosines is None else cosines
    return features @ probe.weight.t() + probe.bias + probe.alpha * cosines


def rows_at_once(zeroshot: Tensor) -> int:
    """Return how many rows are classified at once by zero-shot weights [C, E]."""
    return max(1, NUMBERS_AT_ONCE // len(zeroshot))


def loss_and_gradient(
    probe: Probe, rows: Tensor, labels: Tensor, zeroshot: Tensor, cosines: Tensor | None = None
) -> tuple[Tensor, Probe]:
    """Return the mean cross-entropy [] over rows [n, E] with labels [n], and its gradient.

    Args:
        cosines: products of rows and zero-shot weights [n, C], where they are known.
    """
    total, gradient = rows.new_zeros(()), Probe(*map(torch.zeros_like, probe))
    at_once = rows_at_once(zeroshot)
    for first in range(0, len(rows), at_once):
        some = slice(first, first + at_once)
        part, y = rows[some], labels[some]
        products = part @ zeroshot.t() if cosines is None else cosines[some]
        logits = probe_logits(probe, part, zeroshot, products)
        total += F.cross_entropy(logits, y, reduction="sum")
        change = (logits.softmax(dim=1) - F.one_hot(y, len(zeroshot))) / len(rows)
        gradient.weight.add_(change.t() @ part)
        gradient.bias.add_(change.sum(dim=0))
        gradient.alpha.add_((change * products).sum(dim=0))
    return total / len(rows), gradient


def descend(
    probe: Probe, steps: Steps, rows: Tensor, labels: Tensor, zeroshot: Tensor, *, epochs: int, reset: bool
) -> Probe:
    """Train the probe on all rows at once, and return it.

    Args:
        probe: where the descent starts; it is not changed.
        steps: the step sizes.
        rows: features [n, E] with labels [n].
        zeroshot: zero-shot weights [C, E].
        epochs: number of steps of w and b.
        reset: whether a step of alpha follows the gradient of its epoch alone, not the sum over all epochs until then.
    """
    weight, bias, alpha = (value.clone() for value in probe)
    moving, summed = Probe(*map(torch.zeros_like, probe)), torch.zeros_like(alpha)
    # They never change. Where they are more numbers than are computed at once, each epoch computes them anew.
    cosines = rows @ zeroshot.t() if len(rows) <= rows_at_once(zeroshot) else None
    for epoch in range(epochs):
        _, gradient = loss_and_gradient(Probe(weight, bias, alpha), rows, labels, zeroshot, cosines)
        for value, momentum, slope in ((weight, moving.weight, gradient.weight), (bias, moving.bias, gradient.bias)):
            momentum.mul_(MOMENTUM).add_(slope)
            value.sub_(steps.weight * momentum)
        summed = gradient.alpha if reset else summed + gradient.alpha
        if (epoch + 1) % ALPHA_EVERY == 0:
            alpha.sub_(steps.alpha * summed)
    return Probe(weight, bias, alpha)


class LPPlusPlusLearner(FeatureLearner):
    """The probe: w, b and alpha. It is zero-shot CLIP until it is fitted."""

    CLASS_ROWS = ("weight", "bias", "alpha")

    weight: Tensor
    bias: Tensor
    alpha: Tensor

    def __init__(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.register_buffer("weight", torch.zeros_like(self.zeroshot))
        self.register_buffer("bias", torch.zeros(len(zeroshot)))
        self.register_buffer("alpha", torch.full((len(zeroshot),), self.scale))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E]."""
        return probe_logits(Probe(self.weight, self.bias, self.alpha), features, self.zeroshot)


@dataclass(frozen=True)
class LPPlusPlusConfig(MethodConfig):
    """Settings of LP++. Each view of each image is a row, and all rows make one batch."""

    views: int = kept_views(1, source="1, augmented once")
    epochs: int = key(300, "steps, each on all training images; OPTIM is not used", low=1, source="300")
    reset: bool = key(
        True,
        "whether a step of alpha follows the gradient of its epoch alone; False: the sum over all epochs until then",
        source="False",
    )


@TRAINER_REGISTRY.register()
class LPPlusPlus(FeatureTrainer):
    """A linear probe beside zero-shot CLIP, trained with step sizes that follow from the features."""

    paper = "Huang et al. 2024"
    learns = "a linear classifier beside the weighted text"
    cross_entropy = False  # its step sizes are those of cross-entropy alone
    config = LPPlusPlusConfig
    of_each_class = "weights"
    imagenet_templates = IMAGENET_TEMPLATES_SELECT

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the probe, which is zero-shot CLIP until the fit."""
        learner = LPPlusPlusLearner(clip, classnames, zeroshot)
        self.fitted_parameters = sum(getattr(learner, name).numel() for name in learner.CLASS_ROWS)
        return learner

    def fit(self, features: FeatureSet) -> dict[str, float]:
        """Train the probe on all views of all images; return its loss on them."""
        learner: Any = self.network.learner
        zeroshot, (rows, labels), settings = learner.zeroshot, features.flat(), self.settings
        start, steps = start_probe(features.values, features.labels, zeroshot), step_sizes(rows, zeroshot)
        logger.info(
            "Start: alpha %.4g; steps: w and b %.4g, alpha %.4g",
            float(start.alpha[0]),
            steps.weight,
            steps.alpha,
            extra=DETAIL,
        )
        probe = descend(start, steps, rows, labels, zeroshot, epochs=settings.epochs, reset=settings.reset)
        for name, value in probe._asdict().items():
            getattr(learner, name).copy_(value)
        return {"loss": float(loss_and_gradient(probe, rows, labels, zeroshot)[0])}

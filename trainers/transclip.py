"""TransCLIP: Gaussians with one diagonal covariance, fitted to the images that are to be classified, beside the texts.

Zanella et al., Boosting Vision-Language Models with Transduction, NeurIPS 2024. Assignments z, means mu (of length 1)
and variances sigma are updated in turn:

    ln z_n = lambda ln y_n + (ln p(x_n | mu, sigma) + a_n) / 50 + constant        (5 times; see modules/transduction.py)
    mu_k   = sum_n z_nk x_n / Q + 50 gamma sum_s [y_s = k] x_s / S, with length 1
    sigma  = (sum_nk z_nk (x_n - mu_k)^2 / Q + 50 gamma sum_s (x_s - mu_{y_s})^2 / S) / (1 + 50 gamma)

y are zero-shot probabilities. With supports lambda is 0.5 and the means start at those of the supports. Without, lambda
is 1, gamma 0, and each mean starts at the 8 images that are most surely of its class.

Legend: Q queries, S supports, C classes, E width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import FeatureLearner, SupportLearner, TransductiveConfig, TransductiveTrainer, key
from .base.search import best_place
from .clip import CLIP
from .modules.transduction import (
    ROUNDS,
    SMALLEST,
    TEMPERATURE,
    Graph,
    Moments,
    assign,
    directions,
    log_likelihood,
    moments,
    neighbor_graph,
    spread,
)

GAMMAS = (0.002, 0.01, 0.02, 0.2)
SURE = 8  # images that a mean starts from, without supports


class Mixture(NamedTuple):
    """The Gaussians, and the assignments of the queries."""

    means: Tensor  # [C, E], float64
    variances: Tensor  # [1, E], float64
    assignments: Tensor  # z, [Q, C]


class Known(NamedTuple):
    """The supports as the mixture needs them."""

    sums: Tensor  # sums of each class's features, [C, E], float64
    squares: Tensor  # sum of all squared features, [1, E], float64
    counts: Tensor  # of each class, [C], float64


def describe_supports(supports: Tensor, labels: Tensor, num_classes: int) -> Known:
    """Return what the mixture needs of supports [S, E] with labels [S]."""
    members, x = F.one_hot(labels, num_classes).double(), supports.double()
    return Known(members.t() @ x, x.square().sum(dim=0, keepdim=True), members.sum(dim=0))


def first_means(queries: Tensor, log_y: Tensor, otherwise: Tensor) -> Tensor:
    """Return the mean of the SURE queries that are most surely of each class, weighted by y, with length 1, [C, E].

    Args:
        queries: [Q, E]. log_y: ln y, [Q, C]. otherwise: means where there is no direction, [C, E].
    """
    sure = log_y.topk(min(SURE, len(queries)), dim=0)  # [SURE, C]
    weights = (sure.values - sure.values[:1]).double().exp()  # the factor that y lacks changes no direction
    total = torch.zeros_like(otherwise)
    for places, weight in zip(sure.indices, weights, strict=True):
        total += weight[:, None] * queries[places].double()
    return directions(total, otherwise)


def update(queries: Tensor, last: Mixture, known: Known | None, gamma: float) -> Mixture:
    """Return the Gaussians that follow from the assignments and, with weight gamma, from the supports."""
    size = len(queries)
    mass, first, second = moments(queries, last.assignments, of_each=False)
    mass, first, second, total = mass / size, first / size, second / size, 1.0
    if known is not None:
        weight = gamma * TEMPERATURE / float(known.counts.sum())
        mass, first, second = mass + weight * known.counts, first + weight * known.sums, second + weight * known.squares
        total += gamma * TEMPERATURE
    means = directions(first, last.means)
    apart = spread(Moments(mass, first, second), means)
    return last._replace(means=means, variances=(apart / total).clamp(min=SMALLEST))


def transclip(
    queries: Tensor,
    log_y: Tensor,
    texts: Tensor,
    graph: Graph,
    known: Known | None = None,
    *,
    lambda_: float,
    gamma: float = 0.0,
    start: Mixture | None = None,
) -> tuple[Tensor, Mixture]:
    """Run TransCLIP on one set of queries.

    Args:
        queries: [Q, E], of length 1.
        log_y: ln y, [Q, C].
        texts: means of classes of which nothing else is known, [C, E].
        graph: the neighbors of the queries.
        known: the supports; None: zero-shot.
        lambda_: weight of the texts.
        gamma: weight of the supports.
        start: where to start from; None: from supports or from sure queries.

    Returns:
        What the assignments are the softmax of, [Q, C], and the mixture.
    """
    if start is None:
        width = queries.shape[1]
        otherwise = texts.double()
        means = first_means(queries, log_y, otherwise) if known is None else directions(known.sums, otherwise)
        start = Mixture(means, torch.full_like(means[:1], 1 / width), log_y.exp())
    found, prior = start, lambda_ * log_y
    for turn in range(ROUNDS + 1):
        likelihood = log_likelihood(queries, found.means, found.variances, of_each=False)
        scores, z = assign(prior, likelihood, found.assignments, graph)
        found = found._replace(assignments=z)
        if turn < ROUNDS:
            found = update(queries, found, known, gamma)
    return scores, found


class TransCLIPLearner(SupportLearner):
    """The supports, their weight gamma, and the classification of the images that are given together.

    Args:
        n, use_supports: see SupportLearner.
        lambda_: weight of the texts.
        gamma: weight of the supports until another is chosen.
        displaced: see `neighbor_graph`.
    """

    gamma: Tensor

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        zeroshot: Tensor,
        *,
        n: int,
        use_supports: bool,
        lambda_: float,
        gamma: float,
        displaced: bool = False,
    ) -> None:
        super().__init__(clip, classnames, zeroshot, n=n, use_supports=use_supports)
        self.lambda_, self.displaced = lambda_, displaced
        self.keep_number("gamma", gamma)

    def classify(self, features: Tensor, gammas: Sequence[float]) -> list[Tensor]:
        """Return log-probabilities [Q, C] of features [Q, E] of one set of queries, for each gamma."""
        log_y, texts = self.clip_logits(features).log_softmax(dim=1), self.zeroshot
        if self.use_supports:
            given, classes = (self.supports, self.support_labels), len(texts)
            known = describe_supports(*given, classes)
            graph = neighbor_graph(features, *given, classes=classes, displaced=self.displaced)
        else:
            known, graph = None, neighbor_graph(features)
        return [
            transclip(features, log_y, texts, graph, known, lambda_=self.lambda_, gamma=gamma)[0].log_softmax(dim=1)
            for gamma in gammas
        ]

    def forward(self, features: Tensor) -> Tensor:
        """Return log-probabilities [Q, C], which depend on the whole set, for features [Q, E] of one set of queries."""
        return self.classify(features, [self.peek("gamma", self.gamma)])[0]


@dataclass(frozen=True)
class TransCLIPConfig(TransductiveConfig):
    """Settings of TransCLIP."""

    supports: bool = key(True, "few-shot: the training images are supports; False: zero-shot")
    lambda_: float = key(0.0, "weight of the texts; 0: as in the source", low=0, source="0.5 with supports, 1 without")
    gamma: float = key(
        0.02, "weight of the supports where it cannot be chosen: no validation images", low=0, source="always chosen"
    )
    displaced: bool = key(
        False, "with supports: take neighbors from rows out of place, as the source's code does", source="True"
    )


@TRAINER_REGISTRY.register()
class TransCLIP(TransductiveTrainer):
    """A transductive method: Gaussians and neighbors among the test images, beside the texts."""

    paper = "Zanella et al. 2024"
    learns = "nothing; fits Gaussians to the test images"
    config = TransCLIPConfig

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the learner; its supports are zeros until the fit."""
        settings = self.settings
        return TransCLIPLearner(
            clip,
            classnames,
            zeroshot,
            n=self.num_supports,
            use_supports=settings.supports,
            lambda_=settings.lambda_ or (0.5 if settings.supports else 1.0),
            gamma=settings.gamma,
            displaced=settings.displaced,
        )

    def choose(self) -> None:
        """Choose gamma by the accuracy on the validation images, which are classified together."""
        learner: Any = self.network.learner
        known = self.validation_features()
        if isinstance(known, str):
            gamma, on, n = self.settings.gamma, f"TRAINER.TRANSCLIP.GAMMA ({known})", 0
        else:
            features, labels = known
            found = learner.classify(features, GAMMAS)
            accuracy = 100 * torch.stack([(x.argmax(dim=1) == labels).double().mean() for x in found])
            gamma, on, n = GAMMAS[best_place(accuracy)[0]], "val", len(labels)
            self.write_scalar(f"val/{self.main_head}_at_choice", float(accuracy.max()), self.epoch)
        learner.gamma.fill_(gamma)
        self.note({"gamma": gamma}, on, n)

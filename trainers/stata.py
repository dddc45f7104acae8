"""StatA: Gaussians fitted to the images that are to be classified, and held by the texts where images are few.

Zanella et al., Realistic Test-Time Adaptation of Vision-Language Models, CVPR 2025. Assignments z, means mu (of length
1) and variances sigma of each class are updated in turn:

    ln z_n  = lambda ln y_n + (ln p(x_n | mu, sigma) + a_n) / 50 + constant       (5 times; see modules/transduction.py)
    beta_k  = n_k / (alpha + n_k),    n_k = number of queries whose z is largest for k
    mu_k    = beta_k m_k + (1 - beta_k) t_k, with length 1
    sigma_k = beta_k v_k + (1 - beta_k) (sigma_0 + (mu_k - t_k)^2)

m_k is the mean of the queries under z, with length 1, v_k their mean squared distance from mu_k, and t_k the text. A
class of which no query is keeps its text. The means start at the texts, and all sigma at sigma_0, the mean squared
distance of the queries from the texts under the zero-shot probabilities y.

Legend: Q queries, C classes, E width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dassl.engine import TRAINER_REGISTRY

from .base import FeatureLearner, TransductiveConfig, TransductiveTrainer, key
from .clip import CLIP
from .modules.transduction import (
    ROUNDS,
    SMALLEST,
    assign,
    directions,
    log_likelihood,
    moments,
    neighbor_graph,
    spread,
)

CHUNK = 2500  # queries that the source sums at once


def first_variance(queries: Tensor, y: Tensor, texts: Tensor, uneven: bool) -> Tensor:
    """Return sigma_0, [1, E].

    Args:
        queries: [Q, E]. y: [Q, C]. texts: [C, E], float64.
        uneven: divide the sum of all chunks until now by Q after each chunk of 2,500 queries, as the source does.
    """
    size = len(queries)
    total = torch.zeros_like(texts[:1])
    for rows, weights in zip(queries.split(CHUNK), y.split(CHUNK), strict=True):
        total += spread(moments(rows, weights, of_each=False), texts)
        if uneven:
            total /= size
    return (total if uneven else total / size).clamp(min=SMALLEST)


def stata(
    queries: Tensor,
    log_y: Tensor,
    texts: Tensor,
    *,
    lambda_: float = 1.0,
    alpha: float = 1.0,
    soft: bool = False,
    uneven: bool = False,
) -> Tensor:
    """Run StatA on one set of queries.

    Args:
        queries: [Q, E], of length 1.
        log_y: ln y, [Q, C].
        texts: [C, E], of length 1.
        lambda_: weight of ln y.
        alpha: weight of the texts, in images.
        soft: whether n_k is the sum of z.
        uneven: see `first_variance`.

    Returns:
        What the assignments are the softmax of, [Q, C].
    """
    graph, z, texts = neighbor_graph(queries), log_y.exp(), texts.double()
    first = first_variance(queries, z, texts, uneven)
    means, variances, prior = texts, first.expand_as(texts), lambda_ * log_y
    for turn in range(ROUNDS + 1):
        likelihood = log_likelihood(queries, means, variances, of_each=True)
        scores, z = assign(prior, likelihood, z, graph)
        if turn < ROUNDS:
            sums = moments(queries, z, of_each=True)
            counts = sums.mass if soft else z.argmax(dim=1).bincount(minlength=z.shape[1]).double()
            beta = (counts / (alpha + counts)).nan_to_num()[:, None]  # 0/0: alpha 0 and no query
            own = directions(beta * directions(sums.first, texts) + (1 - beta) * texts, texts)
            filled = (sums.mass > 0)[:, None] & (beta > 0)
            mass = torch.where(filled[:, 0], sums.mass, 1)[:, None]
            held = first + (own - texts).square()
            means = own
            variances = torch.where(filled, beta * spread(sums, own) / mass + (1 - beta) * held, held)
            variances = variances.clamp(min=SMALLEST)
    return scores


class StatALearner(FeatureLearner):
    """Classify the images that are given together; nothing is kept.

    Args:
        lambda_, alpha, soft, uneven: see `stata`.
    """

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        zeroshot: Tensor,
        *,
        lambda_: float,
        alpha: float,
        soft: bool,
        uneven: bool,
    ) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.options: dict[str, Any] = {"lambda_": lambda_, "alpha": alpha, "soft": soft, "uneven": uneven}

    def forward(self, features: Tensor) -> Tensor:
        """Return log-probabilities [Q, C], which depend on the whole set, for features [Q, E] of one set of queries."""
        log_y = self.clip_logits(features).log_softmax(dim=1)
        return stata(features, log_y, self.zeroshot, **self.options).log_softmax(dim=1)


@dataclass(frozen=True)
class StatAConfig(TransductiveConfig):
    """Settings of StatA."""

    lambda_: float = key(1.0, "weight of the zero-shot probabilities", low=0, source="1")
    alpha: float = key(1.0, "weight of a class's text beside its images, in images", low=0, source="1")
    soft: bool = key(False, "count a class's images by their assignments; False: by the largest one", source="False")
    uneven: bool = key(
        False,
        "divide sigma_0 by the number of images after every 2,500 of them, which makes it too small for more than that",
        source="True",
    )


@TRAINER_REGISTRY.register()
class StatA(TransductiveTrainer):
    """A transductive zero-shot method, for test images of few classes or of all."""

    paper = "Zanella et al. 2025"
    learns = "nothing; fits Gaussians to the test images"
    config = StatAConfig

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the learner, which keeps nothing."""
        settings = self.settings
        options = {name: getattr(settings, name) for name in ("lambda_", "alpha", "soft", "uneven")}
        return StatALearner(clip, classnames, zeroshot, **options)

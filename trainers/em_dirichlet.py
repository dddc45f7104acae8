"""EM-Dirichlet: cluster the images to be classified together, in the simplex of their zero-shot probabilities.

Martin et al., Transductive Zero-Shot and Few-Shot CLIP, 2024. z_n = softmax(T cos(f_n, W)), T = 30. Each class has a
Dirichlet distribution over the simplex. Assignments u, class shares pi and parameters alpha are updated in turn so that

    - sum_n sum_k u_nk ln p(z_n | alpha_k) + sum_n sum_k u_nk ln u_nk - lambda sum_k pi_k ln pi_k,   pi_k = mean_n u_nk

never increases. The sums over n run over the queries; the first one also runs over the supports, whose u is their
label. The last term favors few classes. Both variants start from u = z. The hard variant makes u one-hot from the first
update of u on, and leaves out the second term.

Legend: Q queries, S supports, n images, C classes (also the dimension of the simplex).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import FeatureLearner, SupportLearner, TransductiveConfig, TransductiveTrainer, key
from .clip import CLIP

logger = logging.getLogger(__name__)

TINY = 1e-15  # smaller probabilities are replaced by this before a logarithm is taken


def dirichlet_log_likelihood(log_z: Tensor, alpha: Tensor) -> Tensor:
    """Return ln p(z_n | alpha_k) = lgamma(sum alpha_k) - sum lgamma(alpha_k) + sum (alpha_k - 1) ln z_n.

    Args:
        log_z: [n, C]. alpha: [C, C], a row per class.

    Returns:
        [n, C].
    """
    return torch.lgamma(alpha.sum(dim=1)) - torch.lgamma(alpha).sum(dim=1) + log_z @ (alpha - 1).t()


def fit_dirichlet(alpha: Tensor, statistic: Tensor, iterations: int = 1000, tolerance: float = 1e-11) -> Tensor:
    """Fit each row's Dirichlet: increase its weighted likelihood by majorize-minimize steps.

    Each step replaces -lgamma(sum alpha) by its tangent and lgamma(alpha + 1) by the parabola that touches it and is
    equal to it at 0; the minimum of what remains, c a^2 / 2 + b a - ln a, solves a quadratic. No step lowers the
    likelihood.

    Args:
        alpha: [K, C], the start, above 0.
        statistic: [K, C], weighted mean of ln z.
        iterations: steps at most.
        tolerance: squared relative change of alpha below which the fit stops.
    """
    for iteration in range(iterations):
        digamma = torch.digamma(alpha + 1)
        curvature = 2 * (alpha * digamma - torch.lgamma(alpha + 1)) / alpha**2
        curvature = torch.where(alpha > 1e-5, curvature, torch.polygamma(1, torch.ones_like(alpha)))  # the limit at 0
        linear = digamma - torch.digamma(alpha.sum(dim=1, keepdim=True)) - curvature * alpha - statistic
        root = torch.sqrt(linear**2 + 4 * curvature)
        # This is (root - linear) / (2 curvature), written so that nothing cancels where `linear` is above 0.
        new = torch.where(linear > 0, 2 / (root + linear), (root - linear) / (2 * curvature))
        change = float(((new - alpha) ** 2).sum() / (alpha**2).sum())
        alpha = new
        if iteration % 10 == 9 and change < tolerance:
            break
    return alpha


class Clustering(NamedTuple):
    """The result of EM-Dirichlet, fp64."""

    assignments: Tensor  # u of the queries, [Q, C]
    log_scores: Tensor  # what u is the softmax (or arg-max) of, [Q, C]
    alpha: Tensor  # [C, C]
    objective: list[float]  # after each update of alpha and of u


def em_dirichlet(
    queries: Tensor,
    supports: Tensor | None = None,
    support_labels: Tensor | None = None,
    *,
    strength: float,
    hard: bool = False,
    iterations: int = 20,
    mm_iterations: int = 1000,
    tolerance: float = 1e-11,
) -> Clustering:
    """Run EM-Dirichlet on one set of queries.

    Args:
        queries: z of the queries, [Q, C].
        supports: z of the supports, [S, C], or None: zero-shot.
        support_labels: [S].
        strength: lambda / Q.
        hard: whether assignments become one-hot; the first fit of alpha is still to the soft ones.
        iterations: number of rounds, each of which updates alpha, shares and assignments.
        mm_iterations, tolerance: see `fit_dirichlet`.
    """
    size, num_classes = queries.shape
    log_z = queries.double().clamp(min=TINY).log()
    u = queries.double()
    if supports is None or support_labels is None:
        log_all, fixed = log_z, u[:0]
    else:
        log_all = torch.cat([log_z, supports.double().clamp(min=TINY).log()])
        fixed = F.one_hot(support_labels, num_classes).double()
    alpha = torch.ones(num_classes, num_classes, dtype=torch.float64, device=queries.device)
    scores = log_z
    trace: list[float] = []

    def objective() -> float:
        likelihood = (torch.cat([u, fixed]) * dirichlet_log_likelihood(log_all, alpha)).sum()
        share = u.mean(dim=0)
        spread = strength * size * torch.xlogy(share, share).sum()
        entropy = 0.0 if hard else torch.xlogy(u, u).sum()
        return float(entropy - likelihood - spread)

    for _ in range(iterations):
        weights = torch.cat([u, fixed])  # [n, C]
        mass = weights.sum(dim=0)
        filled = mass > TINY  # a class without any image keeps its distribution
        statistic = (weights.t() @ log_all)[filled] / mass[filled, None]
        alpha = alpha.clone()
        alpha[filled] = fit_dirichlet(alpha[filled], statistic, mm_iterations, tolerance)
        trace.append(objective())
        share = u.mean(dim=0)
        scores = dirichlet_log_likelihood(log_z, alpha) + strength * share.clamp(min=TINY).log()
        u = F.one_hot(scores.argmax(dim=1), num_classes).double() if hard else scores.softmax(dim=1)
        trace.append(objective())
    return Clustering(u, scores, alpha, trace)


def match_clusters(alpha: Tensor, assignments: Tensor) -> Tensor:
    """Match each cluster with a class: the arg-max of its Dirichlet mean.

    Where two clusters would get the same class, all clusters with queries are matched one-to-one instead.

    Args:
        alpha: [C, C]. assignments: [Q, C].

    Returns:
        [C], a permutation: clusters without queries get the classes that are left, their own class where possible.
    """
    used = torch.unique(assignments.argmax(dim=1))
    mean = alpha / alpha.sum(dim=1, keepdim=True)
    classes = mean[used].argmax(dim=1)
    if len(torch.unique(classes)) < len(classes):
        _, columns = linear_sum_assignment(mean[used].cpu().numpy(), maximize=True)
        classes = torch.as_tensor(columns, device=alpha.device)
    matched = torch.full((len(alpha),), -1, dtype=torch.long, device=alpha.device)
    matched[used] = classes
    left = torch.ones(len(alpha), dtype=torch.bool, device=alpha.device)
    left[classes] = False
    own = torch.arange(len(alpha), device=alpha.device)
    stays = (matched < 0) & left  # an empty cluster keeps its own class where it can
    matched[stays] = own[stays]
    left[own[stays]] = False
    matched[matched < 0] = own[left]
    return matched


class DirichletLearner(SupportLearner):
    """The supports, and the clustering of the images that are given together.

    Args:
        n, use_supports: see SupportLearner.
        temperature: T.
        effective: how many classes the queries are expected to have; 0: all.
    """

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        zeroshot: Tensor,
        *,
        n: int,
        use_supports: bool,
        temperature: float,
        effective: int,
        hard: bool,
        iterations: int,
        mm_iterations: int,
    ) -> None:
        super().__init__(clip, classnames, zeroshot, n=n, use_supports=use_supports)
        self.temperature = temperature
        self.options: dict[str, Any] = {"hard": hard, "iterations": iterations, "mm_iterations": mm_iterations}
        self.strength = float(len(classnames) // max(1, min(effective or len(classnames), len(classnames))))

    def simplex(self, features: Tensor) -> Tensor:
        """Return the zero-shot probabilities z [n, C] of features [n, E], with temperature T."""
        return (self.temperature * features @ self.zeroshot.t()).softmax(dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """Return log-probabilities [Q, C], which depend on the whole set, for features [Q, E] of one set of queries."""
        queries, options = self.simplex(features), self.options
        if self.use_supports:
            found = em_dirichlet(
                queries, self.simplex(self.supports), self.support_labels, strength=self.strength, **options
            )
            return found.log_scores.log_softmax(dim=1).float()
        found = em_dirichlet(queries, strength=self.strength, **options)
        logits = torch.empty_like(found.log_scores)
        logits[:, match_clusters(found.alpha, found.assignments)] = found.log_scores.log_softmax(dim=1)
        return logits.float()


@dataclass(frozen=True)
class EMDirichletConfig(TransductiveConfig):
    """Settings of EM-Dirichlet."""

    supports: bool = key(True, "few-shot: the training images are supports; False: zero-shot")
    hard: bool = key(False, "the hard variant: one-hot assignments, from the first turn on")
    t: float = key(30.0, "temperature of the simplex", above=0, source="30")
    iter: int = key(0, "turns of alpha, pi and u; 0: as many as in the source", low=0, source="20, hard variant: 10")
    iter_mm: int = key(1000, "inner steps for alpha, at most", low=1, source="1000")
    expected: int = key(
        0,
        "classes that a set of images is expected to have: lambda = images * floor(all classes / these); 0: "
        "TASK_CLASSES in a task, all classes in the whole test set",
        low=0,
        source="5",
    )
    task_size: int = key(
        0, "test images that are classified together: 0: all of them; else tasks of that size", low=0, source="75"
    )


@TRAINER_REGISTRY.register()
class EMDirichlet(TransductiveTrainer):
    """A transductive method: every set of test images (all of them, or each task) is classified as a whole."""

    recipe = 2
    node_name = "EMDIRICHLET"
    paper = "Martin et al. 2024"
    learns = "nothing; clusters the test images"
    config = EMDirichletConfig
    model_name = "em_dirichlet"
    main_head = "em"

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the learner; its supports are zeros until the fit."""
        settings = self.settings
        return DirichletLearner(
            clip,
            classnames,
            zeroshot,
            n=self.num_supports,
            use_supports=settings.supports,
            temperature=settings.t,
            effective=settings.expected or (settings.task_classes if settings.task_size else 0),
            hard=settings.hard,
            iterations=settings.iter or (10 if settings.hard else 20),
            mm_iterations=settings.iter_mm,
        )

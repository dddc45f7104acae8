"""EM-Dirichlet: the images to be classified are clustered together, in the simplex of their zero-shot probabilities.

Martin et al., Transductive Zero-Shot and Few-Shot CLIP, 2024. z_n = softmax(T cos(f_n, W)), T = 30. Each class has a
Dirichlet distribution over the simplex; assignments u, class shares pi and parameters alpha take turns so that

    - sum_n sum_k u_nk ln p(z_n | alpha_k) + sum_n sum_k u_nk ln u_nk - lambda sum_k pi_k ln pi_k,   pi_k = mean_n u_nk

never increases; the sums over n run over the queries, and the first one over the supports too, whose u is their label.
The last term favours few classes. Both variants start from u = z. The hard one makes u one-hot from the first turn of u
on, and leaves the second term out.

Legend: Q queries, S supports, n images, C classes (also the dimension of the simplex).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .clip import CLIP
from .clip.features import Batch, FeatureLoader, FeatureSet
from .common import check_bool, check_number, check_whole
from .compat import MayMakeNoStep
from .frozen import FeatureLearner, FeatureTrainer

logger = logging.getLogger(__name__)

TINY = 1e-15  # probabilities below are taken for this in logarithms


def dirichlet_log_likelihood(log_z: Tensor, alpha: Tensor) -> Tensor:
    """ln p(z_n | alpha_k) = lgamma(sum alpha_k) - sum lgamma(alpha_k) + sum (alpha_k - 1) ln z_n.

    Args:
        log_z: [n, C]. alpha: [C, C], a row per class.

    Returns:
        [n, C].
    """
    return torch.lgamma(alpha.sum(dim=1)) - torch.lgamma(alpha).sum(dim=1) + log_z @ (alpha - 1).t()


def fit_dirichlet(alpha: Tensor, statistic: Tensor, iterations: int = 1000, tolerance: float = 1e-11) -> Tensor:
    """Raises the weighted likelihood of each row's Dirichlet by majorise-minimise steps.

    Each step replaces -lgamma(sum alpha) by its tangent and lgamma(alpha + 1) by the parabola that touches it and is
    equal to it at 0; the minimum of what remains, c a^2 / 2 + b a - ln a, solves a quadratic. No step lowers the
    likelihood.

    Args:
        alpha: [K, C], where to start, above 0.
        statistic: [K, C], weighted mean of ln z.
        tolerance: of the squared relative change, at which to stop.
    """
    for iteration in range(iterations):
        digamma = torch.digamma(alpha + 1)
        curvature = 2 * (alpha * digamma - torch.lgamma(alpha + 1)) / alpha**2
        curvature = torch.where(alpha > 1e-5, curvature, torch.polygamma(1, torch.ones_like(alpha)))  # its limit at 0
        linear = digamma - torch.digamma(alpha.sum(dim=1, keepdim=True)) - curvature * alpha - statistic
        root = torch.sqrt(linear**2 + 4 * curvature)
        # (root - linear) / (2 curvature), written so that nothing cancels where linear is above 0
        new = torch.where(linear > 0, 2 / (root + linear), (root - linear) / (2 * curvature))
        change = float(((new - alpha) ** 2).sum() / (alpha**2).sum())
        alpha = new
        if iteration % 10 == 9 and change < tolerance:
            break
    return alpha


class Clustering(NamedTuple):
    """What EM-Dirichlet ends with, fp64."""

    assignments: Tensor  # u of the queries, [Q, C]
    log_scores: Tensor  # what u is the softmax (or arg-max) of, [Q, C]
    alpha: Tensor  # [C, C]
    objective: list[float]  # after each turn of alpha and of u


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
    """EM-Dirichlet on one set of queries.

    Args:
        queries: z of the queries, [Q, C].
        supports: z of the supports, [S, C], or None: zero-shot.
        support_labels: [S].
        strength: lambda / Q.
        hard: one-hot assignments after the first fit of alpha, which is to the soft ones.
        iterations: turns of alpha, shares and assignments.
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
    """The class of each cluster: the arg-max of its Dirichlet mean, one-to-one where two clusters would have the same.

    Args:
        alpha: [C, C]. assignments: [Q, C].

    Returns:
        [C], a permutation: clusters that no query is in get the classes that are left.
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


def draw_tasks(labels: Tensor, size: int, classes: int, count: int, seed: int) -> list[list[int]]:
    """Rows of `count` sets of `size` images, each of `classes` classes drawn at random; repetitions only across sets.

    Args:
        labels: [N].

    Raises:
        ValueError: there are fewer classes, or too few images in `classes` of them.
    """
    present = torch.unique(labels)
    if classes > len(present):
        raise ValueError(f"Expected tasks of at most {len(present)} classes but got {classes}")
    smallest = int(torch.bincount(labels)[present.long()].sort().values[:classes].sum())
    if smallest < size:
        raise ValueError(f"Expected tasks of at most {smallest} images from any {classes} classes but got {size}")
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for _ in range(count):
        chosen = present[torch.randperm(len(present), generator=generator)[:classes].to(present.device)]
        rows = torch.isin(labels, chosen).nonzero().flatten()
        tasks.append(rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)].tolist())
    return tasks


class DirichletLearner(FeatureLearner):
    """Supports, and the clustering of whatever images come together.

    Args:
        n: number of supports; 0: zero-shot.
        temperature: T.
        effective: how many classes the queries are expected to have; 0: all.
    """

    SAMPLES = ("support_labels", "supports")

    supports: Tensor
    support_labels: Tensor

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
        super().__init__(clip, classnames, zeroshot)
        self.use_supports, self.temperature = use_supports, temperature
        self.options: dict[str, Any] = {"hard": hard, "iterations": iterations, "mm_iterations": mm_iterations}
        self.strength = float(len(classnames) // max(1, min(effective or len(classnames), len(classnames))))
        self.register_buffer("supports", torch.zeros(n, zeroshot.shape[1]))
        self.register_buffer("support_labels", torch.zeros(n, dtype=torch.long))

    def simplex(self, features: Tensor) -> Tensor:
        """Features [n, E] -> z [n, C]."""
        return (self.temperature * features @ self.zeroshot.t()).softmax(dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """Features [Q, E] of one set of queries -> log-probabilities [Q, C]; they depend on the whole set."""
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


@TRAINER_REGISTRY.register()
class EMDirichlet(MayMakeNoStep, FeatureTrainer):
    """Transductive: every set of test images (all of them, or tasks) is classified as a whole."""

    recipe = 2
    node_name = "EMDIRICHLET"
    model_name = "em_dirichlet"
    main_head = "em"
    views_key = False

    @property
    def of_each_class(self) -> str:  # type: ignore[override]  # read from the configuration, never set
        """See CLIPTrainer: images, where they support the clusters."""
        return "images" if self.node.SUPPORTS else ""

    @staticmethod
    def add_config(cfg: Any) -> None:
        """Adds TRAINER.EMDIRICHLET to `cfg` unless it is there."""
        if "EMDIRICHLET" in cfg.TRAINER:
            return
        node = FeatureTrainer.new_node(cfg)
        node.SUPPORTS = True  # few-shot: the training images are supports; False: zero-shot
        node.HARD = False  # the hard variant: one-hot assignments, from the first turn on
        node.T = 30.0  # temperature of the simplex, above 0 (source: 30)
        node.ITER = 0  # turns of alpha, pi and u; 0: as many as in the source, 20, or 10 of the hard variant
        node.ITER_MM = 1000  # inner steps for alpha, at most, at least 1 (source: 1000)
        # Test images that are classified together: 0 = all of them; else tasks of that size (source: 75), drawn with
        # TASK_CLASSES random classes each.
        node.TASK_SIZE = 0
        node.NUM_TASKS = 1000  # number of such tasks, at least 1
        node.TASK_CLASSES = 5  # classes in each, at least 1; lambda = images * floor(all classes / these)
        cfg.TRAINER.EMDIRICHLET = node

    def check_node(self, cfg: Any) -> None:
        """See LearnerTrainer."""
        check_number(cfg, "TRAINER.EMDIRICHLET.T", 0, 1e6, open_low=True)
        for key in ("ITER_MM", "NUM_TASKS", "TASK_CLASSES"):
            check_whole(cfg, f"TRAINER.EMDIRICHLET.{key}")
        for key in ("ITER", "TASK_SIZE"):
            check_whole(cfg, f"TRAINER.EMDIRICHLET.{key}", 0)
        for key in ("SUPPORTS", "HARD"):
            check_bool(cfg, f"TRAINER.EMDIRICHLET.{key}")

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """The supports' features, empty until the fit."""
        node = self.node
        return DirichletLearner(
            clip,
            classnames,
            zeroshot,
            n=len(self.dm.dataset.train_x) if node.SUPPORTS else 0,
            use_supports=node.SUPPORTS,
            temperature=float(node.T),
            effective=node.TASK_CLASSES if node.TASK_SIZE else 0,
            hard=node.HARD,
            iterations=node.ITER or (10 if node.HARD else 20),
            mm_iterations=node.ITER_MM,
        )

    def _register(self, learner: FeatureLearner, optim_cfg: Any) -> None:
        if self.node.SUPPORTS:
            super()._register(learner, optim_cfg)
        else:
            self._optim = None  # nothing to keep

    def has_training_step(self) -> bool:
        """Not in the zero-shot case: a run goes straight to the test."""
        return bool(self.node.SUPPORTS)

    def fit(self, features: FeatureSet) -> dict[str, float]:
        """Keeps the supports -> their number."""
        learner: Any = self.network.learner
        learner.supports.copy_(features.values[0])
        learner.support_labels.copy_(features.labels)
        return {"supports": float(len(features))}

    def _set_up_loaders(self) -> None:
        super()._set_up_loaders()
        node, labels = self.node, torch.tensor([item.label for item in self.dm.dataset.test or ()], dtype=torch.long)
        if node.TASK_SIZE and len(labels):
            draw_tasks(labels, node.TASK_SIZE, node.TASK_CLASSES, 0, 0)  # says now what would go wrong in the end
        self.test_loader = TransductiveLoader(
            self.test_loader, node.TASK_SIZE, node.TASK_CLASSES, node.NUM_TASKS, self._seed
        )
        if self.val_loader is not None:
            self.val_loader = TransductiveLoader(self.val_loader)


class TransductiveLoader(FeatureLoader):
    """Batches that are to be classified as a whole: all images, or (with a size above 0) tasks; see `draw_tasks`."""

    def __init__(self, loader: FeatureLoader, size: int = 0, classes: int = 0, count: int = 1, seed: int = 0) -> None:
        super().__init__(loader.loader, loader.encode, loader.slot)
        self._task = size, classes, count, seed

    def __len__(self) -> int:
        return self._task[2]

    def __iter__(self) -> Iterator[Batch]:
        known = self.all()
        self.regroup(draw_tasks(known.labels.cpu(), *self._task) if self._task[0] else [list(range(len(known)))])
        return super().__iter__()

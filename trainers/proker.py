"""ProKeR: kernel ridge regression of what zero-shot CLIP leaves of one-hot labels, in closed form.

Bendou et al., ProKeR: A Kernel Perspective on Few-Shot Adaptation of Large Vision-Language Models, 2025.

    logits = s (f T^T + K(f, S) A)          K(x, y) = exp(-beta (1 - x y))
    A = (K(S, S) / lambda + I)^-1 R         R = Y - S T^T

T are the zero-shot weights, Y one-hot labels, and the rows of S are the features of all views of the training images:
a view counts as an image. The ridge regression of R would be K(f, S) A / lambda. The source leaves out the division, so
lambda is also the weight of the regression beside the cosines. CLIP's temperature s, which does not change the order
of the classes, stands in the source only where it trains on.

beta and lambda are chosen in the source's grid on validation images. Where there are none they are chosen by leaving
out, which is ours: each training image, with all its views, is classified by all others. That is exact and needs no
further fit. Only images count whose class keeps two others: with one left of two, the class looks worse than it is, and
the source's fixed values are better. With G = (K(S, S) / lambda + I)^-1, and i the rows of an image,

    the regression without the image, at its rows, times lambda:  lambda (R_i - (G_ii)^-1 (G R)_i)

More than 20,000 rows take Nystroem's approximation instead of a matrix of their size: f in K(f, S) meets 10,000 of the
rows, the landmarks Z, and all rows count in A = lambda (K(Z, S) K(S, Z) + lambda K(Z, Z))^-1 K(Z, S) R.

Legend: V views, N images, n = V N rows, M rows that A is for (n, or landmarks), C classes, E width of the joint
embedding, B images in a batch. Equations are solved in float64.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import FeatureLearner, FeatureTrainer, MethodConfig, kept_views, key
from .base.search import best_place
from .clip import CLIP, IMAGENET_TEMPLATES_SELECT
from .features import FeatureSet
from .modules.gaussian import class_counts

logger = logging.getLogger(__name__)

MOST_ROWS = 20_000  # most rows whose kernel matrix is made: 3.2 GB, and two more of that size while it is solved
LANDMARKS = 10_000
KEPT = 2  # fewest images of its class that stay where an image is left out
JITTER = 1e-8  # on the diagonal of the landmarks' kernel matrix, which may have equal rows
NUMBERS_AT_ONCE = 2**26  # most numbers in the rows of the kernel between rows and landmarks

# Where nothing is searched: images of each class -> (beta, lambda). The source averaged what its search on ImageNet
# found, with RN50.
FIXED = {1: (3.0, 0.05), 2: (2.6, 0.05), 4: (1.5, 0.05), 8: (1.66, 0.07), 16: (1.7, 0.1)}


class Axis(NamedTuple):
    """`steps` evenly spaced values from `start` to `end`, both included."""

    start: float
    end: float
    steps: int

    def values(self) -> list[float]:
        """Return the values of the axis in rising order."""
        return torch.linspace(self.start, self.end, int(self.steps), dtype=torch.float64).tolist()


# By the names of our datasets: the axes of beta and lambda. The source's other datasets, and ours, have GRID.
GRID = (Axis(0.5, 3, 20), Axis(0.001, 1, 10))
GRIDS = {
    "DescribableTextures": (Axis(0.1, 10, 20), Axis(0.001, 10, 100)),
    "EuroSAT": (Axis(0.5, 3, 20), Axis(0.001, 1, 100)),
    "ImageNet": (Axis(1.5, 3, 10), Axis(0.05, 0.25, 10)),
    "OxfordFlowers": (Axis(0.1, 10, 20), Axis(0.001, 10, 100)),
    "OxfordPets": (Axis(0.01, 5, 40), Axis(0.01, 0.3, 20)),
    "StanfordCars": (Axis(0.1, 10, 5), Axis(0.01, 1, 5)),
    "SUN397": (Axis(0.1, 10, 20), Axis(0.01, 10, 10)),
}


def fixed_values(images: float) -> tuple[float, float]:
    """Return the source's beta and lambda for the nearest number of images of each class, by ratio."""
    return FIXED[min(FIXED, key=lambda known: abs(math.log(known / images)))]


def kernel(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """Return exp(-beta (1 - x y)) [B, M] for features x [B, E] and y [M, E] of length 1."""
    return torch.exp(beta * (x @ y.t() - 1))


class Ridge:
    """The regression of R at one beta, without landmarks.

    Args:
        rows: S, [n, E], float64.
        residual: R, [n, C], float64.
        beta: sharpness of the kernel.
    """

    def __init__(self, rows: Tensor, residual: Tensor, beta: float) -> None:
        self.gram = kernel(rows, rows, beta)
        self.residual = residual

    def _factor(self, lambda_: float) -> Tensor:
        system = self.gram / lambda_
        system.diagonal().add_(1)
        return torch.linalg.cholesky(system)

    def coefficients(self, lambda_: float) -> Tensor:
        """Return A [n, C]."""
        return torch.cholesky_solve(self.residual, self._factor(lambda_))

    def left_out(self, lambda_: float, views: int) -> Tensor:
        """Return the regression, times lambda, at the rows of each image without that image, [N, V, C].

        Args:
            lambda_: strength of the ridge.
            views: V; the rows are those of the first view, then those of the second one, ...
        """
        inverse = torch.cholesky_inverse(self._factor(lambda_))
        own = torch.arange(len(inverse), device=inverse.device).view(views, -1).t()  # rows of an image, [N, V]
        blocks = inverse[own[:, :, None], own[:, None, :]]  # [N, V, V]
        return lambda_ * (self.residual[own] - torch.linalg.solve(blocks, (inverse @ self.residual)[own]))


class LandmarkRidge:
    """The regression of R at one beta, with landmarks.

    Args:
        rows: S, [n, E]. Each part of them is taken to float64 on its own.
        residual: R, [n, C], float64.
        beta: sharpness of the kernel.
        landmarks: Z, [M, E], float64.
    """

    def __init__(self, rows: Tensor, residual: Tensor, beta: float, landmarks: Tensor) -> None:
        among = kernel(landmarks, landmarks, beta)
        among.diagonal().add_(JITTER)
        self.root = torch.linalg.cholesky(among)
        # With Q = root^-1 K(Z, S), A = lambda root^-T (Q Q^T + lambda I)^-1 Q R.
        self.normal, self.right = torch.zeros_like(among), residual.new_zeros(len(landmarks), residual.shape[1])
        at_once = max(1, NUMBERS_AT_ONCE // len(landmarks))
        for part, left in zip(rows.split(at_once), residual.split(at_once), strict=True):
            half = torch.linalg.solve_triangular(self.root, kernel(landmarks, part.double(), beta), upper=False)
            self.normal += half @ half.t()
            self.right += half @ left

    def coefficients(self, lambda_: float) -> Tensor:
        """Return A [M, C]."""
        system = self.normal.clone()
        system.diagonal().add_(lambda_)
        found = torch.cholesky_solve(self.right, torch.linalg.cholesky(system))
        return lambda_ * torch.linalg.solve_triangular(self.root.t(), found, upper=True)


def pick_landmarks(n: int, images: int, seed: int) -> Tensor:
    """Return which of n rows are the landmarks: all images in random order, in their first view, then in others."""
    generator = torch.Generator().manual_seed(seed)
    order = [view * images + torch.randperm(images, generator=generator) for view in range(n // images)]
    return torch.cat(order)[:LANDMARKS].sort().values


class ProKeRLearner(FeatureLearner):
    """The regression: the rows that the kernel compares with, A transposed, and beta.

    Args:
        rows: M.
    """

    CLASS_ROWS = ("coefficients",)

    support: Tensor
    coefficients: Tensor
    beta: Tensor

    def __init__(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, rows: int) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.register_buffer("support", torch.zeros(rows, zeroshot.shape[1]))
        self.register_buffer("coefficients", torch.zeros(len(zeroshot), rows))
        self.keep_number("beta", 1.0)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E]."""
        near = kernel(features, self.support, self.peek("beta", self.beta))
        return self.clip_logits(features) + self.scale * near @ self.coefficients.t()

    def for_classes(
        self, state: dict[str, Tensor], trained: Sequence[str] | None, indices: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """Return `state` with A of the present classes, which are compared with the images of all trained ones.

        Raises:
            ValueError: a present class is not among those trained on.
        """
        state = super().for_classes(state, trained, indices)
        rows = len(state["support"])  # as many as the checkpoint has
        self.support = self.support.new_zeros(rows, self.support.shape[1])
        self.coefficients = self.coefficients.new_zeros(len(self.coefficients), rows)
        return state


Ridges = Callable[[float], Ridge | LandmarkRidge]  # beta -> the regression
Score = Callable[[Any, float, float], Tensor]  # regression, beta, lambda -> how good it is, []


@dataclass(frozen=True)
class ProKeRConfig(MethodConfig):
    """Settings of ProKeR. Each view of each image is a row."""

    views: int = kept_views(10, source="10; 1, as at test time, on ImageNet")
    search: bool = key(
        True, "whether beta and lambda are chosen; False: those below", source="True, and False for its transfer"
    )
    beta: float = key(
        0.0, "sharpness of the kernel where it is not chosen; 0: the source's, by images per class", low=0,
        source="3, 2.6, 1.5, 1.66, 1.7 with 1, 2, 4, 8, 16",
    )  # fmt: skip
    lambda_: float = key(
        0.0, "strength of the ridge, and weight, where it is not chosen; 0: the source's, by images per class", low=0,
        source="0.05, 0.05, 0.05, 0.07, 0.1 with 1, 2, 4, 8, 16",
    )  # fmt: skip
    beta_grid: tuple[float, ...] = key(
        (), "(first, last, number) of the values of beta that are searched; (): the source's", source="by dataset"
    )
    lambda_grid: tuple[float, ...] = key(
        (), "(first, last, number) of the values of lambda that are searched; (): the source's", source="by dataset"
    )

    def check(self, path: str) -> None:
        """Check the grids of beta and lambda; see MethodConfig."""
        for name in ("beta_grid", "lambda_grid"):
            axis = getattr(self, name)
            if axis and not (len(axis) == 3 and 0 < axis[0] <= axis[1] < math.inf and axis[2] in range(1, 10**6)):
                raise ValueError(
                    f"Expected {path}.{name.upper()} to be () or two numbers above 0, in rising order, and a whole "
                    f"number above 0, but got {axis}"
                )


@TRAINER_REGISTRY.register()
class ProKeR(FeatureTrainer):
    """Kernel ridge regression beside zero-shot CLIP, in closed form."""

    paper = "Bendou et al. 2025"
    learns = "a kernel regression, in closed form"
    cross_entropy = False
    config = ProKeRConfig
    of_each_class = "weights"
    imagenet_templates = IMAGENET_TEMPLATES_SELECT

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the regression, which is zero until the fit."""
        n = max(self.views, 1) * len(self.dm.dataset.train_x)
        learner = ProKeRLearner(clip, classnames, zeroshot, n if n <= MOST_ROWS else LANDMARKS)
        self.fitted_parameters = learner.coefficients.numel()
        return learner

    def axes(self) -> tuple[list[float], list[float]]:
        """Return the values of beta and lambda that are searched."""
        given, own = (self.settings.beta_grid, self.settings.lambda_grid), GRIDS.get(self.cfg.DATASET.NAME, GRID)
        first, second = (Axis(*axis) if axis else usual for axis, usual in zip(given, own, strict=True))
        return first.values(), second.values()

    def fit(self, features: FeatureSet) -> dict[str, float]:
        """Choose beta and lambda, regress, and return the number of rows."""
        learner: Any = self.network.learner
        (rows, labels), classes = features.flat(), len(learner.classnames)
        counts = class_counts(features.labels, classes)
        residual = F.one_hot(labels, classes).double()
        for part, left in zip(rows.split(MOST_ROWS), residual.split(MOST_ROWS), strict=True):
            left -= part.double() @ learner.zeroshot.double().t()
        support = rows
        if len(rows) > MOST_ROWS:
            support = rows[pick_landmarks(len(rows), len(features), self._seed).to(rows.device)]
            logger.info("%d rows are more than %d: %d of them are landmarks", len(rows), MOST_ROWS, len(support))

        def ridges(beta: float) -> Ridge | LandmarkRidge:
            if len(support) < len(rows):
                return LandmarkRidge(rows, residual, beta, support.double())
            return Ridge(rows.double(), residual, beta)

        beta, lambda_ = self.chosen(features, counts, support, ridges)
        learner.support.copy_(support)
        learner.coefficients.copy_(ridges(beta).coefficients(lambda_).t())
        learner.beta.fill_(beta)
        return {"rows": float(len(rows))}

    def chosen(self, features: FeatureSet, counts: Tensor, support: Tensor, ridges: Ridges) -> tuple[float, float]:
        """Choose beta and lambda, and record on what.

        Args:
            features: those of the training images. counts: images of each class, [C].
            support: the rows that the kernel compares with, [M, E].
            ridges: beta -> the regression.
        """
        known, settings, node = self.validation_features(), self.settings, f"TRAINER.{self.node_name}"
        images = counts[features.labels] > KEPT
        if not settings.search:
            reason = f"{node}.SEARCH is False"
        elif not isinstance(known, str):
            return self._search(self._on_validation(*known, support), ridges, "val", len(known[1]))
        elif len(support) < len(features.values) * len(features):
            reason = f"{known}, too many rows to leave out images"
        elif not images.any():
            reason = f"{known}, too few images of each class to leave out one"
        else:
            on = f"training images, each left out once ({known})"
            return self._search(self._by_leaving_out(features, images), ridges, on, int(images.sum()))
        beta, lambda_ = fixed_values(len(features) / len(counts))
        found = settings.beta or beta, settings.lambda_ or lambda_
        self.note(dict(zip(("beta", "lambda"), found, strict=True)), f"{node}.BETA, .LAMBDA ({reason})", 0)
        return found

    def _search(self, score: Score, ridges: Ridges, on: str, n: int) -> tuple[float, float]:
        betas, lambdas = self.axes()
        scores = torch.zeros(len(betas), len(lambdas), dtype=torch.float64)
        for i, beta in enumerate(betas):
            ridge = ridges(beta)
            for j, lambda_ in enumerate(lambdas):
                scores[i, j] = score(ridge, beta, lambda_)
        i, j = best_place(scores)
        self.note({"beta": betas[i], "lambda": lambdas[j]}, on, n)
        if on == "val":
            self.write_scalar(f"val/{self.main_head}_at_choice", float(scores.max()), self.epoch)
        return betas[i], lambdas[j]

    def _on_validation(self, features: Tensor, labels: Tensor, support: Tensor) -> Score:
        """Return the accuracy (percent) on validation images, as a function."""
        learner: Any = self.network.learner
        cosines, last = features @ learner.zeroshot.t(), [(math.nan, features)]

        def score(ridge: Any, beta: float, lambda_: float) -> Tensor:
            if last[0][0] != beta:
                last[0] = beta, kernel(features, support, beta)
            logits = cosines + last[0][1] @ ridge.coefficients(lambda_).to(features)
            return 100 * (logits.argmax(dim=1) == labels).double().mean()

        return score

    def _by_leaving_out(self, features: FeatureSet, images: Tensor) -> Score:
        """Return the accuracy (percent) on the views of left-out images, as a function."""
        learner: Any = self.network.learner
        views, labels = features.values[:, images].transpose(0, 1), features.labels[images]
        cosines = views.double() @ learner.zeroshot.double().t()  # [N', V, C]

        def score(ridge: Any, beta: float, lambda_: float) -> Tensor:
            logits = cosines + ridge.left_out(lambda_, len(features.values))[images]
            return 100 * (logits.argmax(dim=-1) == labels[:, None]).double().mean()

        return score

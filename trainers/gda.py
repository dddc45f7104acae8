"""GDA: Gaussians with one common covariance beside zero-shot CLIP, in closed form.

Wang et al., A Hard-to-Beat Baseline for Training-Free CLIP-Based Adaptation, 2024.

    logits = s f T^T + alpha (f W^T + b)     W = mu P     b_k = log(1/C) - mu_k P mu_k^T / 2
    P = E (S + tr(S) / (n - 1) I)^-1

T are the zero-shot weights. mu are the means of the classes over the n = V N views of the training images, S is the
scatter of all views around the means of their classes. alpha is chosen in the source's grid on validation images, the
least of equals. Where there are none it is chosen by leaving out: the likelihood of each training image under the
classifier of all others, which is ours. It is exact: means and scatter without the V views of an image differ from
those with them by a matrix of rank V (see `left_out_logits`).

A class that was not trained on has a Gaussian, too. Around its text t, of the 64 nearest views of all training images:

    mu = (sum of the 64 + 16 t) / 80     P = mean over the new classes of E (S_t + tr(S_t) / 63 I)^-1

S_t is the scatter of the 64 around t. So P depends on the class list, and a list with one new class is new as a whole.

Legend: V views, N images, B images in a batch, C classes, E width of the joint embedding. Gaussians are computed in
float64: the source inverts in the precision of the features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dassl.engine import TRAINER_REGISTRY

from .base import FeatureLearner, FeatureTrainer, MethodConfig, class_rows, kept_views, key
from .base.search import best_place
from .clip import CLIP, IMAGENET_TEMPLATES_SELECT
from .features import FeatureSet
from .modules.gaussian import LEAST_SPREAD, class_counts, class_means, linear, pooled_scatter, precision_matrix

ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
NEAREST, COPIES = 64, 16  # views that describe a new class, and how often its text counts beside them
AT_ONCE = 2**22  # most numbers in the logits of the images that are left out at once
NEW_AT_ONCE = 64  # new classes described at once


class Gaussians(NamedTuple):
    """Means [C, E] and scatter [E, E] of training features, float64, and the number of images of each class, [C]."""

    means: Tensor
    scatter: Tensor
    counts: Tensor


def fit_gaussians(values: Tensor, labels: Tensor, num_classes: int) -> Gaussians:
    """Fit the Gaussians to features [V, N, E] of images with labels [N].

    Raises:
        ValueError: a class has no image.
    """
    means = class_means(values, labels, num_classes)
    return Gaussians(means, pooled_scatter(values, labels, means), class_counts(labels, num_classes))


def describe_new(texts: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means [C, E] and P [E, E] of classes that were not trained on.

    Each inverse is that of a multiple of I plus a matrix of rank 64, so that matrices of 64 x 64 are factored.

    Args:
        texts: text features of the new classes, [C, E], normalized.
        views: features of all views of the training images, [n, E], normalized.

    Raises:
        ValueError: there are no views.
    """
    if not len(views):
        raise ValueError("Expected a checkpoint of GDA with features of training images but it has none")
    k, width = min(NEAREST, len(views)), texts.shape[1]
    identity = torch.eye(k, dtype=torch.float64, device=texts.device)
    inverse = torch.zeros(width, width, dtype=torch.float64, device=texts.device)
    means = []
    for part in texts.split(NEW_AT_ONCE):
        near, text = views[(part @ views.t()).topk(k, dim=1).indices].double(), part.double()  # [c, k, E], [c, E]
        means.append((near.sum(dim=1) + COPIES * text) / (k + COPIES))
        apart = near - text[:, None]
        ridge = (apart.square().sum(dim=(1, 2)) / max(k - 1, 1)).clamp(min=LEAST_SPREAD)[:, None, None]
        # (ridge I + X^T X)^-1 = (I - X^T (ridge I + X X^T)^-1 X) / ridge
        factor = torch.linalg.cholesky(apart @ apart.mT + ridge * identity)
        half = (torch.linalg.solve_triangular(factor, apart, upper=False) / ridge.sqrt()).flatten(0, 1)
        inverse += torch.eye(width, dtype=torch.float64, device=texts.device) * (1 / ridge).sum() - half.t() @ half
    return torch.cat(means), width * inverse / len(texts)


def left_out_logits(rows: Tensor, labels: Tensor, fitted: Gaussians, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits f W^T + b + log(C) of the views of images, each by the Gaussians of all other images.

    With Z the views of an image around the mean of its class, u their sum, and m the number of views that the class
    keeps, its mean moves by -u / m, and S becomes S - Z^T (I + 11^T / m) Z. In the axes of S the rest is a diagonal
    matrix plus one of rank V, which the Woodbury identity inverts.

    Args:
        rows: features of B images, [B, V, E], float64, in the axes of the scatter.
        labels: [B]; each class has two images or more.
        fitted: the Gaussians of all images, means in the axes of the scatter.
        spread: eigenvalues of the scatter, [E].

    Returns:
        logits [B, V, C], and whether the other images have any spread, [B]; where not, the logits mean nothing.
    """
    views, width = rows.shape[1:]
    means, each = fitted.means, torch.arange(len(rows), device=rows.device)
    kept = (views * (fitted.counts[labels] - 1)).double()  # m, [B]
    centered = rows - means[labels][:, None]  # Z
    total = centered.sum(dim=1)
    trace = spread.sum() - centered.square().sum(dim=(1, 2)) - total.square().sum(dim=1) / kept
    ridge = trace / max(views * (int(fitted.counts.sum()) - 1) - 1, 1)
    known = ridge > LEAST_SPREAD
    scale = 1 / (spread + torch.where(known, ridge, 1.0)[:, None])  # the diagonal part of the inverse, [B, E]
    own = means[labels] - total / kept[:, None]  # the mean of the image's class without it, [B, E]

    def with_means(vectors: Tensor) -> Tensor:  # [B, V, E] -> products with the means, [B, V, C]
        products = vectors @ means.t()
        products[each, :, labels] = (vectors @ own[:, :, None]).squeeze(-1)
        return products

    lengths = scale @ means.square().t()  # [B, C]
    lengths[each, labels] = (scale * own.square()).sum(dim=1)
    scaled, identity = rows * scale[:, None], torch.eye(views, dtype=rows.dtype, device=rows.device)
    # G = root Z with root^2 = I + 11^T / m, so that S becomes S - G^T G.
    root = identity + (((1 + views / kept).sqrt() - 1) / views)[:, None, None]
    spanned = root @ centered
    factor = torch.linalg.cholesky(identity - spanned * scale[:, None] @ spanned.mT)
    of_means, of_rows = (
        torch.linalg.solve_triangular(factor, products, upper=False)
        for products in (with_means(spanned * scale[:, None]), spanned @ scaled.mT)
    )  # [B, V, C], [B, V, V]
    products = with_means(scaled) + of_rows.mT @ of_means
    lengths = lengths + of_means.square().sum(dim=1)
    return width * (products - lengths[:, None] / 2), known


def left_out_likelihood(
    values: Tensor, labels: Tensor, zeroshot: Tensor, scale: float, alphas: Sequence[float]
) -> tuple[Tensor, int]:
    """Return the mean log-likelihood [A] of left-out images' views under each of the A alphas, and their number.

    An image is left out with all its views. Images that are the only one of their class count as training images of
    others only.

    Args:
        values: features of the training images, [V, N, E].
        labels: [N].
        zeroshot: zero-shot weights [C, E], and CLIP's temperature `scale`.

    Raises:
        ValueError: a class has no image.
    """
    fitted = fit_gaussians(values, labels, len(zeroshot))
    spread, axes = torch.linalg.eigh(fitted.scatter)
    spread, turned = spread.clamp(min=0), fitted._replace(means=fitted.means @ axes)
    sums, n = torch.zeros(len(alphas), dtype=torch.float64, device=values.device), 0
    images = (fitted.counts[labels] > 1).nonzero().flatten()
    for part in images.split(max(1, AT_ONCE // (len(values) * sum(zeroshot.shape)))):
        rows, y = values[:, part].transpose(0, 1).double(), labels[part]  # [B, V, E], [B]
        logits, known = left_out_logits(rows @ axes, y, turned, spread)
        logits, rows, y = logits[known], rows[known], y[known]
        clip_logits = scale * rows @ zeroshot.double().t()
        for i, alpha in enumerate(alphas):
            likelihood = (clip_logits + alpha * logits).log_softmax(dim=-1)
            sums[i] += likelihood.gather(2, y[:, None, None].expand(-1, len(values), 1)).sum() / len(values)
        n += len(y)
    return sums / max(n, 1), n


class GDALearner(FeatureLearner):
    """The Gaussians as a linear classifier, its weight alpha, and the training features, which new classes need.

    Args:
        n: number of views of training images.
        alpha: value until another is chosen.
    """

    CLASS_ROWS = ("weight", "bias")
    SAMPLES = ("view_labels", "views")

    weight: Tensor
    bias: Tensor
    views: Tensor
    view_labels: Tensor
    alpha: Tensor

    def __init__(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, *, n: int, alpha: float) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.register_buffer("weight", torch.zeros_like(self.zeroshot))
        self.register_buffer("bias", torch.zeros(len(zeroshot)))  # without log(1/C)
        self.register_buffer("views", torch.zeros(n, zeroshot.shape[1]))
        self.register_buffer("view_labels", torch.zeros(n, dtype=torch.long))
        self.keep_number("alpha", alpha)

    def gaussian_logits(self, features: Tensor) -> Tensor:
        """Return the Gaussians' logits f W^T + b [B, C] for features [B, E]."""
        return features @ self.weight.t() + (self.bias - math.log(len(self.bias)))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E]."""
        return self.clip_logits(features) + self.peek("alpha", self.alpha) * self.gaussian_logits(features)

    def fit(self, features: FeatureSet) -> None:
        """Fit the Gaussians to the training features, and keep these.

        Raises:
            ValueError: a class has no image.
        """
        means, scatter, _ = fit_gaussians(features.values, features.labels, len(self.classnames))
        views, labels = features.flat()
        weight, bias = linear(means, precision_matrix(scatter, len(views)))
        for name, value in (("weight", weight), ("bias", bias), ("views", views), ("view_labels", labels)):
            getattr(self, name).copy_(value)

    def for_classes(
        self, state: dict[str, Tensor], trained: Sequence[str] | None, indices: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """Return `state` for the present classes: their own Gaussians, or those around their texts if any is new.

        Raises:
            ValueError: a class is new, and there are no training features.
        """
        try:
            class_rows(self.classnames, trained or self.classnames, indices)
        except ValueError:  # not all were trained on
            views = state["views"].to(self.zeroshot)
            weight, bias = linear(*describe_new(self.zeroshot, views))
            return super().for_classes({**state, "weight": weight.float(), "bias": bias.float()}, None, None)
        return super().for_classes(state, trained, indices)


@dataclass(frozen=True)
class GDAConfig(MethodConfig):
    """Settings of GDA."""

    views: int = kept_views(10, source="10")
    # The source starts its search from 0.1. With one image of each class that was worse than zero-shot CLIP on Shapes.
    alpha: float = key(
        0.01,
        "weight of the Gaussians where it cannot be chosen: no validation images, and no class has two training images",
        low=0,
        source="0.1, where nothing in its grid is right once",
    )


@TRAINER_REGISTRY.register()
class GDA(FeatureTrainer):
    """A classifier of Gaussians with one covariance, in closed form, beside zero-shot CLIP."""

    paper = "Wang et al. 2024"
    learns = "class means and one covariance, in closed form"
    cross_entropy = False
    config = GDAConfig
    imagenet_templates = IMAGENET_TEMPLATES_SELECT

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the classifier, which is zero until the fit."""
        n = max(self.views, 1) * len(self.dm.dataset.train_x)
        learner = GDALearner(clip, classnames, zeroshot, n=n, alpha=self.settings.alpha)
        self.fitted_parameters = learner.weight.numel() + learner.bias.numel()
        return learner

    def fit(self, features: FeatureSet) -> dict[str, float]:
        """Fit the Gaussians to all views, and return the number of these."""
        learner: Any = self.network.learner
        learner.fit(features)
        return {"views": float(len(learner.views))}

    def choose(self) -> None:
        """Choose alpha by the accuracy on validation images, or by leaving out where there are none."""
        learner: Any = self.network.learner
        known = self.validation_features()
        if isinstance(known, str):
            self._choose_without(known)
            return
        features, labels = known
        clip_logits, logits = learner.clip_logits(features), learner.gaussian_logits(features)
        hits = [((clip_logits + alpha * logits).argmax(dim=1) == labels).double().mean() for alpha in ALPHAS]
        accuracy = 100 * torch.stack(hits)
        self._take(ALPHAS[best_place(accuracy)[0]], "val", len(labels))
        self.write_scalar(f"val/{self.main_head}_at_choice", float(accuracy.max()), self.epoch)

    def _choose_without(self, reason: str) -> None:
        learner: Any = self.network.learner
        known = self.train_features.all()
        likelihood, n = left_out_likelihood(known.values, known.labels, learner.zeroshot, learner.scale, ALPHAS)
        if n:
            self._take(ALPHAS[best_place(likelihood)[0]], f"training images, each left out once ({reason})", n)
        else:
            self._take(self.settings.alpha, f"TRAINER.GDA.ALPHA ({reason}, no training image can be left out)", 0)

    def _take(self, alpha: float, on: str, n: int) -> None:
        learner: Any = self.network.learner
        learner.alpha.fill_(alpha)
        self.note({"alpha": alpha}, on, n)

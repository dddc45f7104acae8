"""The prototype classifier of DLR-CLIP's third level: it compares images with images, in closed form.

A class is a Gaussian around its prototype, and all classes share one covariance (linear discriminant analysis). Both
are shrunk, because a class has few images:

    m_k = (n_k x_k + kappa p_k) / (n_k + kappa)         x_k: mean of the class's n_k images
    p_k = c + g (t_k - t)                               what the text says: c mean of the x_k, t mean of the texts t_k,
                                                        g >= 0 the least-squares slope of x_k - c on t_k - t
    S   = (1 - rho) S_0 + rho tr(S_0) / E * I           S_0: scatter of images around prototypes that leave them out,
                                                        plus the scatter of an image's views around their mean
    logits_k = w_k f + b_k          w_k = S^-1 m_k      b_k = -1/2 m_k S^-1 m_k

(kappa, rho) are not chosen but averaged over: the classifiers of a grid, each at its best temperature, are weighted by
their likelihood on validation images. The average of linear classifiers is one linear classifier.

The same classifier compares the mean patches of two blocks of the image encoder, of which no text says anything: its
p_k is c for each class. Each block's are centered on the training images, and normalized.

Legend: V views, N images, B images in a batch, C classes, E width of the joint embedding (of what is compared), G
points of the grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules.gaussian import class_sums, pooled_scatter

KAPPAS = (0.1, 0.3, 1.0, 3.0, 10.0)  # how many images the text counts for
RHOS = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)  # how far the covariance goes toward a multiple of the identity
TEMPERATURES = tuple(2 ** (i / 2) for i in range(-16, 9))  # factors of logits
UNKNOWN = 0.05  # how many images of any class count beside the validation images


class Point(NamedTuple):
    """The classifier at one point of the grid.

    Attributes:
        kappa, rho: the point.
        means: prototypes [C, E].
        away: [N, E], each image minus the prototype of its class without it.
        precision: S^-1 [E, E].
    """

    kappa: float
    rho: float
    means: Tensor
    away: Tensor
    precision: Tensor

    def linear(self) -> tuple[Tensor, Tensor]:
        """Return the weight [C, E] and the bias [C]."""
        weight = self.means @ self.precision
        return weight, -0.5 * (weight * self.means).sum(dim=1)


class Gaussians:
    """The statistics of training images that prototypes are made of, in double precision.

    Args:
        features: [V, N, E], of V views of N images.
        labels: [N].
        text: text features [C, E].

    Raises:
        ValueError: there is no image.
    """

    def __init__(self, features: Tensor, labels: Tensor, text: Tensor) -> None:
        if not len(labels):
            raise ValueError("Expected at least one training image to make prototypes of but got none")
        self.labels = labels
        text = text.double()
        self.images = features.mean(dim=0, dtype=torch.float64)
        self.counts = torch.bincount(labels, minlength=len(text)).to(text)
        self.sums = class_sums(self.images, labels, len(text))
        means = self.sums / self.counts.clamp(min=1).unsqueeze(1)
        # A class without images has no say in where the images lie.
        present = self.counts > 0
        center = means[present].mean(dim=0)
        differences = text - text[present].mean(dim=0)
        seen = differences[present]
        slope = ((means[present] - center) * seen).sum() / seen.square().sum().clamp(min=1e-12)
        self.said = center + slope.clamp(min=0) * differences
        itself = torch.arange(len(labels), device=labels.device)  # each image is the class of its views
        self.view_scatter = pooled_scatter(features, itself, self.images) / (features.shape[0] * len(labels))

    def prototypes(self, kappa: float) -> Tensor:
        """Return m [C, E]."""
        return (self.sums + kappa * self.said) / (self.counts + kappa).unsqueeze(1)

    def others(self, kappa: float) -> Tensor:
        """Return for each image the prototype of its class without it, [N, E]."""
        rest = self.sums[self.labels] - self.images + kappa * self.said[self.labels]
        return rest / (self.counts[self.labels] - 1 + kappa).unsqueeze(1)

    def grid(self) -> Iterator[Point]:
        """Yield the classifier of each point of the grid."""
        for kappa in KAPPAS:
            means, away = self.prototypes(kappa), self.images - self.others(kappa)
            scatter = away.t() @ away / len(away) + self.view_scatter
            values, vectors = torch.linalg.eigh(scatter)
            for rho in RHOS:
                shrunk = (1 - rho) * values.clamp(min=0) + rho * values.mean().clamp(min=1e-12)
                precision = (vectors / shrunk) @ vectors.t()
                yield Point(kappa, rho, means, away, precision)

    def left_out(self, point: Point) -> Tensor:
        """Return the logits [N, C] that each training image gets from the classifier without it.

        Its class's prototype leaves the image out. The covariance leaves out all images of its class (Woodbury's
        formula): how far these lie from their prototypes depends on the image, and of a class of two, either image
        alone tells the direction of the other. What the text says of the classes, and the scatter of views, stay.
        """
        _, rho, means, away, precision = point
        moved, weight = away @ precision, means @ precision
        distance = (self.images @ precision * self.images).sum(dim=1, keepdim=True) - 2 * self.images @ weight.t()
        distance += (weight * means).sum(dim=1)
        rows = torch.arange(len(away), device=away.device)
        distance[rows, self.labels] = (moved * away).sum(dim=1)
        for label in self.labels.unique().tolist():
            own = (self.labels == label).nonzero().squeeze(1)
            # Without the n images of the class, S^-1 is precision + (1 - rho) moved' inner^-1 moved.
            mine, n = moved[own], len(own)
            identity = torch.eye(n, dtype=away.dtype, device=away.device)
            inner = len(away) * identity - (1 - rho) * mine @ away[own].t()
            seen = torch.cat([self.images[own], away[own], means]) @ mine.t()  # [2 n + C, n]
            solved = (1 - rho) * torch.linalg.solve(inner, seen.t()).t()
            lengths = (seen * solved).sum(dim=1)
            added = lengths[:n].unsqueeze(1) - 2 * seen[:n] @ solved[2 * n :].t() + lengths[2 * n :]
            added[:, label] = lengths[n : 2 * n]
            distance[own] += added
        return -0.5 * distance


def with_another(labels: Tensor) -> Tensor:
    """Return a mask [N] of the images whose class has another image; of all images where no class has two.

    The others say nothing when they are left out: their class is the one without any image, which tells which it is.
    """
    mask = torch.bincount(labels)[labels] > 1
    return mask if mask.any() else torch.ones_like(mask)


def doubtful_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropy over images, plus UNKNOWN times that of an image of any class.

    The second part is what keeps logits finite that classify every image rightly.

    Args:
        logits: [n, C]. labels: [n].
    """
    log_p = F.log_softmax(logits, dim=1)
    return F.nll_loss(log_p, labels, reduction="sum") - UNKNOWN * log_p.mean()


def best_temperature(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the best factor of TEMPERATURES for logits [n, C], and the mean cross-entropy at it.

    Best is the one with the least `doubtful_cross_entropy`.
    """
    doubts = torch.stack([doubtful_cross_entropy(factor * logits, labels) for factor in TEMPERATURES])
    factor = TEMPERATURES[int(doubts.argmin())]
    return factor, float(F.cross_entropy(factor * logits, labels))


class Prototypes(nn.Module):
    """The averaged prototype classifier. It has buffers only: nothing of it is trained with the rest.

    Args:
        classes: C.
        width: E.
    """

    weight: Tensor  # [C, E]
    bias: Tensor  # [C]
    kappa: Tensor  # mean over the grid
    rho: Tensor
    count: Tensor  # validation images that weighed the grid; 0: none

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(classes, width))
        self.register_buffer("bias", torch.zeros(classes))
        self.register_buffer("kappa", torch.tensor(float("nan")))
        self.register_buffer("rho", torch.tensor(float("nan")))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for normalized features [B, E], in fp32."""
        with torch.autocast(device_type=features.device.type, enabled=False):
            return features.float() @ self.weight.t() + self.bias

    @torch.no_grad()
    def fit(
        self, features: Tensor, labels: Tensor, text: Tensor | None, validation: tuple[Tensor, Tensor] | None
    ) -> Tensor | None:
        """Fit the classifier to training images.

        Args:
            features: [V, N, E], normalized, of V views of the images.
            labels: [N].
            text: text features [C, E]; None: no text says anything, p_k is c.
            validation: features [n, E] and labels [n] of validation images, which weigh the points of the grid; None:
                all count the same, at the temperatures that are best for leave-one-out logits of images whose class has
                another image (of all, where no class has).

        Returns:
            Without validation images, the leave-one-out logits [N, C] of the training images; None where they say
            nothing, as no text speaks for a class without images and no class has two.
            With validation images, None.

        Raises:
            ValueError: there is no training image.
        """
        gaussians = Gaussians(features, labels, self.weight.new_zeros(self.weight.shape) if text is None else text)
        tested = with_another(labels)
        scores, kappas, rhos, weights, biases, left_out = [], [], [], [], [], None
        for point in gaussians.grid():
            weight, bias = point.linear()
            if validation is None:
                every = gaussians.left_out(point)
                logits, known = every[tested], labels[tested]
            else:
                logits, known = validation[0].double() @ weight.t() + bias, validation[1]
            factor, entropy = best_temperature(logits, known)
            scores.append(0.0 if validation is None else -entropy * len(known))
            weights.append(factor * weight)
            biases.append(factor * bias)
            kappas.append(point.kappa)
            rhos.append(point.rho)
            if validation is None:  # all points count the same
                left_out = factor * every if left_out is None else left_out + factor * every
        share = torch.softmax(torch.tensor(scores, dtype=torch.float64, device=labels.device), dim=0)
        self.weight.copy_(torch.einsum("g,gce->ce", share, torch.stack(weights)))
        self.bias.copy_(torch.einsum("g,gc->c", share, torch.stack(biases)))
        self.kappa.fill_(float(share @ share.new_tensor(kappas)))
        self.rho.fill_(float(share @ share.new_tensor(rhos)))
        self.count.fill_(0 if validation is None else len(validation[1]))
        if left_out is None or (text is None and gaussians.counts.max() < 2):
            return None
        return left_out / len(scores)


class PatchPrototypes(Prototypes):
    """The averaged prototype classifier of the mean patches of several blocks; see the head of this file.

    Args:
        classes: C.
        widths: of the blocks; together they are E.
    """

    center: Tensor  # [E], mean of the training images

    def __init__(self, classes: int, widths: Sequence[int]) -> None:
        super().__init__(classes, sum(widths))
        self.widths = list(widths)
        self.register_buffer("center", torch.zeros(sum(widths)))

    def centered(self, patches: Tensor) -> Tensor:
        """Return mean patches [..., E] minus the center, those of each block normalized, in fp32."""
        parts = (patches.float() - self.center).split(self.widths, dim=-1)
        return torch.cat([F.normalize(part, dim=-1) for part in parts], dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for mean patches [B, E], in fp32."""
        with torch.autocast(device_type=features.device.type, enabled=False):
            return super().forward(self.centered(features))

    @torch.no_grad()
    def fit(
        self, features: Tensor, labels: Tensor, text: Tensor | None, validation: tuple[Tensor, Tensor] | None
    ) -> Tensor | None:
        """Fit the classifier to the mean patches [V, N, E] of training images; see Prototypes.

        Args:
            features, labels: of the training images.
            text: None: no text says anything of patches.
            validation: mean patches [n, E] and labels [n]; None: there are none.
        """
        if len(labels):
            self.center.copy_(features.mean(dim=(0, 1), dtype=torch.float64))
        seen = None if validation is None else (self.centered(validation[0]), validation[1])
        return super().fit(self.centered(features), labels, text, seen)

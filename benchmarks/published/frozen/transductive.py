"""Methods that classify all test images together, as published: every pair of an image and a class is laid out.

Legend: Q queries, S supports, C classes, E width of the features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.published.frozen.base import Published, accuracy, unit

AT_ONCE = 2500  # images whose differences from all means are laid out at once, [images, C, E]
NEIGHBORS = 3


def affinity_matrix(queries: Tensor, supports: Tensor | None = None) -> Tensor:
    """Return a sparse matrix [S + Q, Q] of the nearest queries of each image, by a matrix of all pairs."""
    affinity = queries @ queries.t()
    if supports is not None:
        affinity = torch.cat([supports @ queries.t(), affinity])
    nearest = affinity.topk(NEIGHBORS + 1, -1).indices[:, 1:]
    rows, columns = torch.arange(len(affinity))[:, None].repeat(1, NEIGHBORS).flatten(), nearest.flatten()
    places = torch.stack([rows, columns])
    return torch.sparse_coo_tensor(places, affinity[rows, columns], affinity.shape, check_invariants=False)


def log_likelihood(queries: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Return -1/2 sum (x - mu)^2 / sigma, [Q, C]."""
    parts = queries.split(AT_ONCE)
    return torch.cat([-0.5 * ((x[:, None] - means[None]) ** 2 * (1 / variances[None])).sum(dim=2) for x in parts])


def assignments(likelihood: Tensor, prior: Tensor, z: Tensor, near: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the assignments [Q, C] after five updates.

    Args:
        likelihood: [Q, C]. prior: y^lambda, [Q, C]. z: [Q, C].
        near: what `affinity_matrix` returns.
        labels: one-hot labels of the supports, [S, C].
    """
    size = len(likelihood)
    z = torch.cat([z, labels]) if labels is not None else z.clone()
    for _ in range(5):
        found = likelihood + 50 / (2 * NEIGHBORS) * (near.t() @ z + (near @ z[:size])[:size])
        found = found - found.max(dim=1, keepdim=True)[0]
        found = prior * torch.exp(found / 50)
        z[:size] = found / found.sum(dim=1, keepdim=True)
    return z[:size]


class TransCLIP(Published):
    """Gaussians with one variance; neighbors are displaced, as in the source."""

    keys = ("TRAINER.TRANSCLIP.DISPLACED", True)
    probabilities = True

    def squares(self, images: Tensor, weights: Tensor, means: Tensor) -> Tensor:
        """Return the weighted sum of squared differences from all means, [E]."""
        parts = zip(images.split(AT_ONCE), weights.split(AT_ONCE), strict=True)
        return sum(
            (torch.einsum("ij,ijk->k", w, (x[:, None] - means[None]) ** 2) for x, w in parts),
            torch.zeros(images.shape[1]),
        )

    def solve(self, queries: Tensor, gammas: list[float]) -> list[Tensor]:
        """Return the assignments [Q, C] of queries for each gamma."""
        supports, labels, found = self.views[0], self.one_hot(self.labels), []
        y = self.clip_logits(queries).softmax(dim=1)
        near, q, s = affinity_matrix(queries, supports), len(queries), len(supports)
        for gamma in gammas:
            means, variances, z, weight = unit(labels.t() @ supports), None, y, gamma * 50 / s
            variances = torch.full((queries.shape[1],), 1 / queries.shape[1])
            for turn in range(11):
                likelihood = log_likelihood(queries, means, variances[None])
                z = assignments(likelihood, y**0.5, z, near, labels)
                if turn == 10:
                    break
                means = torch.einsum("ij,ik->jk", z / q, queries) + torch.einsum("ij,ik->jk", weight * labels, supports)
                means = unit(means / (z.sum(dim=0) / q + weight * labels.sum(dim=0))[:, None])
                variances = self.squares(queries, z, means) / q + weight * self.squares(supports, labels, means)
                variances = variances / (z.sum() / q + weight * labels.sum())
            found.append(z)
        return found

    @torch.no_grad()
    def fit(self) -> None:
        best, gammas = 0.0, [0.002, 0.01, 0.02, 0.2]
        for gamma, z in zip(gammas, self.solve(self.val, gammas), strict=True):
            found = accuracy(z, self.val_labels)
            if found > best:
                best, self.chosen = found, {"gamma": gamma}

    def logits(self, features: Tensor) -> Tensor:
        return self.solve(features, [self.chosen["gamma"]])[0]


class StatA(Published):
    """Gaussians with variances of each class, held by the texts."""

    fits = False
    probabilities = True

    def logits(self, features: Tensor) -> Tensor:
        texts, y = self.texts, self.clip_logits(features).softmax(dim=1)
        parts = list(zip(features.split(AT_ONCE), y.split(AT_ONCE), strict=True))
        sums = [torch.einsum("ij,ijk->k", w, (x[:, None] - texts[None]) ** 2) for x, w in parts]
        first = (torch.stack(sums).sum(dim=0) / len(features))[None].repeat(self.classes, 1)
        near, z, means, variances = affinity_matrix(features), y.clone(), texts, first
        for turn in range(11):
            likelihood = log_likelihood(features, means, variances) - 0.5 * variances.log().sum(dim=1)[None]
            z = assignments(likelihood, y, z, near)
            if turn == 10:
                break
            counts = torch.bincount(z.argmax(dim=1), minlength=self.classes)
            beta = (counts / (self.settings.alpha + counts + 1e-12))[:, None]
            own = unit(torch.einsum("ij,ik->jk", z, features) / z.sum(dim=0)[:, None])
            means = unit(beta * own + (1 - beta) * texts)
            sums = [
                ((x[:, None] - means[None]) ** 2 * w[:, :, None]).sum(dim=0)
                for x, w in zip(features.split(AT_ONCE), z.split(AT_ONCE), strict=True)
            ]
            moved = texts - means
            products = torch.diagonal(torch.bmm(moved[:, :, None], moved[:, None]), dim1=1, dim2=2)
            variances = beta * (sum(sums) / z.sum(dim=0)[:, None]) + (1 - beta) * (first + products)
        return z


class EMDirichlet(Published):
    """Dirichlet distributions over the simplex; their fit looks at its change every 50th step only."""

    fits = False
    probabilities = True

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.strength = trainer.network.learner.strength
        self.iterations = trainer.network.learner.options["iterations"]

    def simplex(self, features: Tensor) -> Tensor:
        """Return the logarithm of the probabilities [n, C]."""
        return ((self.settings.t * features @ self.texts.t()).softmax(dim=1) + 1e-15).log()

    def curvature(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Return the curvature of the parabola, and the digamma function of alpha + 1."""
        digamma = torch.polygamma(0, alpha + 1)
        found = 2 * (torch.lgamma(torch.ones(1)) - torch.lgamma(alpha + 1) + digamma * alpha) / alpha**2
        return torch.where(alpha > 1e-11, found.abs(), torch.polygamma(1, torch.ones(1))), digamma

    def fitted(self, alpha: Tensor, statistic: Tensor) -> Tensor:
        """Return alpha [C, C] after majorize-minimize steps."""
        for step in range(self.settings.iter_mm):
            curvature, digamma = self.curvature(alpha)
            b = digamma - torch.polygamma(0, alpha.sum(-1))[:, None] - curvature * alpha - statistic
            new = (-b + torch.sqrt(b**2 + 4 * curvature)) / (2 * curvature)
            if step > 0 and step % 50 == 0 and torch.norm(new - alpha) ** 2 / torch.norm(alpha) ** 2 < 1e-11:
                return new
            alpha = new.clone()
        return alpha

    def logits(self, features: Tensor) -> Tensor:
        log_z, log_supports, labels = self.simplex(features), self.simplex(self.views[0]), self.one_hot(self.labels)
        u, alpha = log_z.exp(), torch.ones(self.classes, self.classes)
        for _ in range(self.iterations):
            total = (labels[:, :, None] * log_supports[:, None]).sum(dim=0) + (u[:, :, None] * log_z[:, None]).sum(
                dim=0
            )
            alpha = self.fitted(alpha, total / (labels.sum(dim=0) + u.sum(dim=0))[:, None])
            share = torch.log(u.sum(dim=0) / len(u) + 1e-15) + 1
            scores = torch.lgamma(alpha.sum(-1)) - torch.lgamma(alpha).sum(-1)
            scores = scores + ((alpha[None] - 1) * log_z[:, None]).sum(-1)
            u = (scores + self.strength * share).softmax(1)
        return u

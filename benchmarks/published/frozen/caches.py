"""Caches of training images beside zero-shot CLIP, as published. Legend: see base.py.

The searches compute anew at each point of the grid, as the sources do: affinities, exponentials, the product with
one-hot labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.published.frozen.base import Published, Trained, accuracy, linear, unit

KL_ROWS = 100  # images whose divergences from all keys are computed at once


class TipAdapter(Published):
    """The cache; each point of the grid of beta and alpha computes all logits."""

    keys: tuple[Any, ...] = ("TRAINER.TIPADAPTER.SEARCH_STEP", (10, 20))
    cut = "10 of 200 beta"

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.axes = trainer.axes()

    def fill(self) -> None:
        """Fill the cache."""
        self.cache_keys = unit(self.views.mean(dim=0)).t()  # [E, N]
        self.cache_values = self.one_hot(self.labels)

    def affinity(self, features: Tensor) -> Tensor:
        """Return cosines [n, N]."""
        return features @ self.cache_keys

    def at(self, features: Tensor, alpha: float, beta: float) -> Tensor:
        """Return logits at a point of the grid."""
        cache_logits = (-(beta - beta * self.affinity(features))).exp() @ self.cache_values
        return self.clip_logits(features) + cache_logits * alpha

    def search(self) -> None:
        """Choose beta and alpha."""
        best = 0.0
        for beta in self.axes["betas"]:
            for alpha in self.axes["alphas"]:
                found = accuracy(self.at(self.val, alpha, beta), self.val_labels)
                if found > best:
                    best, self.chosen = found, {"alpha": alpha, "beta": beta}

    @torch.no_grad()
    def fit(self) -> None:
        self.fill()
        self.search()

    def logits(self, features: Tensor) -> Tensor:
        return self.at(features, **self.chosen)


class TipAdapterF(TipAdapter, Trained):
    """The cache whose keys are the weights of a linear layer."""

    keys = ("TRAINER.TIPADAPTERF.SEARCH_STEP", (10, 20))
    fit = Trained.fit

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.initial = trainer.initial

    def build(self) -> Iterable[Tensor]:
        self.fill()
        self.adapter = linear(self.cache_keys.t())
        return self.adapter.parameters()

    def affinity(self, features: Tensor) -> Tensor:
        return self.adapter(features)

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.at(features, **self.initial)
        return logits, nn.functional.cross_entropy(logits, labels)


class TipX(TipAdapter):
    """The cache, and divergences of distributions over classes, of which each pair of images is laid out."""

    keys = ("TRAINER.TIPX.SEARCH_STEP", (5, 20))
    cut = "5 of 200 beta"

    def distributions(self, features: Tensor) -> Tensor:
        """Return each image's distribution over the classes, [n, C]."""
        return (features @ self.texts.t() / self.settings.temperature).softmax(dim=-1)

    def divergences(self, queries: Tensor) -> Tensor:
        """Return the divergence of each query's distribution from each key's, [n, N], for distributions [n, C]."""
        out = torch.zeros(len(queries), len(self.of_keys))
        for first in range(0, len(queries), KL_ROWS):
            part = queries[first : first + KL_ROWS]
            repeated = torch.repeat_interleave(part, len(self.of_keys), dim=0)
            others = torch.cat([self.of_keys] * len(part))
            pairs = repeated * (repeated.log() - others.log())
            out[first : first + KL_ROWS] = pairs.sum(dim=-1).view(len(part), -1)
        return out

    def fill(self) -> None:
        super().fill()
        self.of_keys = self.distributions(self.cache_keys.t())
        apart = ~torch.eye(len(self.of_keys), dtype=torch.bool)
        # Our ranges are those over pairs of training images, where the source takes images that are tested.
        divergences, cosines = self.divergences(self.of_keys)[apart], (self.cache_keys.t() @ self.cache_keys)[apart]
        self.ranges = [float(x) for y in (divergences, cosines) for x in (y.min(), y.max())]

    def scaled(self, divergences: Tensor) -> Tensor:
        """Return divergences, led to the range of cosines."""
        low, high, least, most = self.ranges
        out = (divergences - low) / (high - low)
        out *= most - least
        out += least
        return out

    def search(self) -> None:
        """Choose alpha, beta and gamma."""
        best, divergences, top = 0.0, self.divergences(self.distributions(self.val)), min(5, self.classes)
        for alpha in self.axes["alphas"]:
            for beta in self.axes["betas"]:
                affinity = self.affinity(self.val)
                cache_logits = (-(beta - beta * affinity)).exp() @ self.cache_values
                clip_logits = self.clip_logits(self.val)
                text_logits = -self.scaled(divergences) @ self.cache_values
                for gamma in self.axes["gammas"]:
                    logits = clip_logits + text_logits * gamma + cache_logits * alpha
                    found = accuracy(logits, self.val_labels, top)
                    if found > best:
                        best, self.chosen = found, {"alpha": alpha, "beta": beta, "gamma": gamma}

    def logits(self, features: Tensor) -> Tensor:
        text_logits = -self.scaled(self.divergences(self.distributions(features))) @ self.cache_values
        alpha, beta, gamma = (self.chosen[name] for name in ("alpha", "beta", "gamma"))
        return self.at(features, alpha, beta) + text_logits * gamma


class APE(Published):
    """The cache on chosen channels; each pair of samples of different classes is multiplied on its own."""

    keys: tuple[Any, ...] = ("TRAINER.APE.SEARCH_STEP", (2, 20, 20))
    cut = "2 of 200 beta"

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.axes, self.q = trainer.axes(), len(trainer.network.learner.channels)

    def fill(self) -> None:
        """Fill the cache, class by class, as the source sorts it."""
        order = self.labels.argsort(stable=True)
        self.cache_keys = unit(self.views.mean(dim=0))[order]
        self.cache_values = self.one_hot(self.labels[order])

    def samples(self) -> Tensor:
        """Return the texts and the keys of each class, [C, samples, E]."""
        return torch.cat([self.texts[:, None], self.cache_keys.view(self.classes, -1, self.texts.shape[1])], dim=1)

    def channels(self) -> Tensor:
        """Return the chosen channels."""
        feats = self.samples()
        total, count = torch.zeros(feats.shape[2]), 0
        for i in range(feats.shape[0]):
            for j in range(feats.shape[0]):
                for m in range(feats.shape[1]):
                    for n in range(feats.shape[1]):
                        if i != j:
                            total += feats[i, m] * feats[j, n]
                            count += 1
        weight = self.settings.weight
        criterion = -weight * total / count + (1 - weight) * self.texts.var(dim=0)
        return criterion.topk(self.q).indices

    @torch.no_grad()
    def fit(self) -> None:
        self.fill()
        self.indices = self.channels()
        self.chosen_keys = unit(self.cache_keys[:, self.indices])
        keys_by_texts = (self.chosen_keys @ unit(self.texts[:, self.indices]).t()).softmax(1)
        ratio = (self.cache_values + 1e-6) / (keys_by_texts + 1e-6)
        self.divergence = torch.sum(self.cache_values * torch.log2(ratio), dim=1)[:, None]
        affinity, clip_logits = unit(self.val[:, self.indices]) @ self.chosen_keys.t(), self.clip_logits(self.val)
        best, (betas, alphas, gammas) = 0.0, self.axes
        for beta in betas:
            for alpha in alphas:
                for gamma in gammas:
                    values = self.cache_values * (self.divergence * gamma).exp()
                    cache_logits = (-(beta - beta * affinity)).exp() @ values
                    found = accuracy(clip_logits + cache_logits * alpha, self.val_labels)
                    if found > best:
                        best, self.chosen = found, {"alpha": alpha, "beta": beta, "gamma": gamma}

    def logits(self, features: Tensor) -> Tensor:
        alpha, beta, gamma = (self.chosen[name] for name in ("alpha", "beta", "gamma"))
        affinity = unit(features[:, self.indices]) @ self.chosen_keys.t()
        values = self.cache_values * (self.divergence * gamma).exp()
        return self.clip_logits(features) + (-(beta - beta * affinity)).exp() @ values * alpha


class APET(APE, Trained):
    """The residual, added to copies of all keys and texts in every step; at each point of the grid, too."""

    keys = ("TRAINER.APET.SEARCH_STEP", (10, 20))
    cut = "10 of 200 beta"
    fit = Trained.fit

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.initial = trainer.initial

    def samples(self) -> Tensor:
        return self.texts[:, None]

    def build(self) -> Iterable[Tensor]:
        self.fill()
        self.indices = self.channels()
        self.residual = nn.Parameter(torch.zeros(self.classes, self.q))
        self.strength = nn.Parameter(torch.ones(len(self.cache_keys), 1))
        return [self.residual, self.strength]

    def at(self, features: Tensor, alpha: float, beta: float) -> Tensor:
        """Return logits at a point of the grid."""
        shots = len(self.cache_keys) // self.classes
        keys, texts = self.cache_keys.clone(), self.texts.t().clone()
        keys[:, self.indices] = keys[:, self.indices] + self.residual[:, None].repeat(1, shots, 1).flatten(0, 1)
        texts[self.indices] = texts[self.indices] + self.residual.t()
        cache_logits = (-(beta - beta * (features @ keys.t()))).exp() @ (self.cache_values * self.strength)
        return self.scale * features @ texts + cache_logits * alpha

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and the loss, a cross-entropy with targets that could be smoothed."""
        logits = self.at(features, **self.initial)
        return logits, -(self.one_hot(labels) * logits.log_softmax(dim=-1)).sum(dim=-1).mean()

    def search(self) -> None:
        """Choose beta and alpha."""
        best, (betas, alphas) = 0.0, self.axes
        for beta in betas:
            for alpha in alphas:
                found = accuracy(self.at(self.val, alpha, beta), self.val_labels)
                if found > best:
                    best, self.chosen = found, {"alpha": alpha, "beta": beta}

    def logits(self, features: Tensor) -> Tensor:
        return self.at(features, **self.chosen)

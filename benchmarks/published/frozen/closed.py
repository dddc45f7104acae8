"""Methods on frozen features that are fitted to all training images at once, as published. Legend: see base.py."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.published.frozen.base import Published, accuracy, unit

GDA_ALPHAS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


class LinearProbe(Published):
    """Logistic regression; each step of the binary search fits both ends of the interval anew."""

    def fitted(self, c: float) -> tuple[Any, float]:
        """Fit with strength c; return the model, and its accuracy on validation images."""
        model = LogisticRegression(solver="lbfgs", max_iter=self.settings.max_iter, C=c)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(self.rows.numpy(), self.row_labels.numpy())
        found = model.predict(self.val.numpy()) == self.val_labels.numpy()
        return model, float(found.sum() / len(found))

    def fit(self) -> None:
        powers = [1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6]
        peak = powers[int(np.argmax([self.fitted(c)[1] for c in powers]))]
        left, right = 1e-1 * peak, 1e1 * peak
        for _ in range(8):
            (at_left, accuracy_left), (at_right, accuracy_right) = self.fitted(left), self.fitted(right)
            middle = 10 ** (0.5 * (np.log10(right) + np.log10(left)))
            if accuracy_left < accuracy_right:
                self.chosen, self.model, left = {"C": right}, at_right, middle
            else:
                self.chosen, self.model, right = {"C": left}, at_left, middle

    def logits(self, features: Tensor) -> Tensor:
        return torch.from_numpy(self.model.decision_function(features.numpy()))


def gaussians(rows: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return W [E, C] and b [C] of Gaussians with one covariance, whose regularized estimate is pseudo-inverted."""
    means = torch.cat([rows[labels == i].mean(dim=0, keepdim=True) for i in range(classes)])
    centered = torch.cat([rows[labels == i] - means[i][None] for i in range(classes)])
    n, width = centered.shape
    inverse = width * torch.linalg.pinv(
        (n - 1) * centered.t().cov() + centered.t().cov().trace() * torch.eye(width), hermitian=False
    )
    prior = torch.ones(classes) / classes
    weight = torch.einsum("nd, dc -> cn", means, inverse)
    return weight, prior.log() - torch.einsum("nd, dc, nc -> n", means, inverse, means) / 2


class GDA(Published):
    """Gaussians beside zero-shot CLIP."""

    def at(self, features: Tensor, alpha: float) -> Tensor:
        """Return logits with a weight."""
        return self.clip_logits(features) + alpha * (features @ self.weight + self.bias)

    def search(self, alphas: Sequence[float]) -> None:
        """Choose the weight."""
        best = 0.0
        for alpha in alphas:
            found = accuracy(self.at(self.val, alpha), self.val_labels)
            if found > best:
                best, self.chosen = found, {"alpha": alpha}

    @torch.no_grad()
    def fit(self) -> None:
        self.weight, self.bias = gaussians(self.rows, self.row_labels, self.classes)
        self.search(GDA_ALPHAS)

    def logits(self, features: Tensor) -> Tensor:
        return self.at(features, self.chosen["alpha"])


class TIMO(GDA):
    """Texts weighed by images, class by class, and Gaussians of images and texts."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        order = trainer.text_labels.argsort(stable=True)
        self.prompts = trainer.texts[order].clone().view(self.classes, -1, trainer.texts.shape[1])  # [C, P, E]

    def at(self, features: Tensor, alpha: float) -> Tensor:
        return alpha * features @ self.weighed.t() + features @ self.weight + self.bias

    @torch.no_grad()
    def fit(self) -> None:
        prompts, images = unit(self.prompts), unit(self.views.mean(dim=0))
        by_class = torch.stack([images[self.labels == i] for i in range(self.classes)])  # [C, shots, E]
        means = unit(by_class.mean(dim=1))
        weights, scores = torch.ones(prompts.shape[:2]), []
        for i in range(self.classes):
            weights[i] = (means[i : i + 1] @ prompts[i].t()).squeeze(0)
            scores.append(weights[i].clone())
            weights[i] = F.softmax(weights[i] / weights[i].norm() * self.settings.sharpness, dim=0)
        self.weighed = unit(torch.einsum("cp, cpd -> cd", weights, prompts))
        best, order = torch.stack(scores).topk(prompts.shape[1], dim=-1)
        sorted_prompts = torch.stack([prompts[i][order[i]].clone() for i in range(self.classes)])
        samples = (sorted_prompts * best[..., None]).flatten(0, 1)
        labels = torch.arange(self.classes).repeat_interleave(prompts.shape[1])
        rows, row_labels = torch.cat([samples, self.rows]), torch.cat([labels, self.row_labels])
        self.weight, self.bias = gaussians(rows, row_labels, self.classes)
        self.search([10.0**i for i in range(-4, 5)])


class LPPlusPlus(Published):
    """A probe beside the weighted texts, by autograd over all images; the step of alpha sums gradients (RESET False).

    Its steps are at the edge of stability: on random features rounding grows tenfold in ten steps. So there are ten.
    """

    keys = ("TRAINER.LPPLUSPLUS.EPOCHS", 10, "TRAINER.LPPLUSPLUS.RESET", False)
    cut = "10 of 300 steps"

    def fit(self) -> None:
        features, labels, texts = self.rows, self.row_labels, self.texts.t()
        values, _ = eigh((features.t() @ features).numpy())
        rate = 4 * len(features) / max(values)
        members = self.one_hot(labels)
        each = (members * (features @ texts) / members.sum(dim=0, keepdim=True)).sum(dim=0)
        self.alpha = (250 * each.mean() * torch.ones(1, self.classes)).requires_grad_()
        alpha_rate = len(features) / (4 * max(torch.sum((features @ texts) ** 2, dim=0)))
        self.head = nn.Linear(features.shape[1], self.classes)
        self.head.weight.data, self.head.bias.data = members.t() @ features, torch.zeros(self.classes)
        optimizer = torch.optim.SGD(self.head.parameters(), float(rate), momentum=0.9)
        for epoch in range(self.settings.epochs):
            logits = self.logits(features)
            loss = F.cross_entropy(logits, labels)
            accuracy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (epoch + 1) % 10 == 0:
                assert self.alpha.grad is not None
                self.alpha.data -= alpha_rate * self.alpha.grad.data

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features) + torch.ones(len(features), 1) @ self.alpha * (features @ self.texts.t())


class ProKeR(Published):
    """Kernel ridge regression; each point of the grid solves for all rows."""

    keys = ("TRAINER.PROKER.VIEWS", 1, "TRAINER.PROKER.BETA_GRID", (0.5, 3.0, 2))
    cut = "2 of 20 beta, 1 of 10 views"

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.axes = trainer.axes()

    def kernel(self, features: Tensor, beta: float) -> Tensor:
        """Return the kernel of features and rows, [n, rows]."""
        return (-beta * (1 - features @ self.rows.t())).exp()

    def solved(self, among: Tensor, lambda_: float) -> Tensor:
        """Return the coefficients [rows, C]."""
        return torch.linalg.solve(1 / lambda_ * among + torch.eye(len(self.rows)), self.residual)

    @torch.no_grad()
    def fit(self) -> None:
        self.residual = self.one_hot(self.row_labels) - self.rows @ self.texts.t()
        best, cosines = 0.0, self.val @ self.texts.t()
        for beta in self.axes[0]:
            among, near = self.kernel(self.rows, beta), self.kernel(self.val, beta)
            for lambda_ in self.axes[1]:
                found = accuracy(cosines + near @ self.solved(among, lambda_), self.val_labels)
                if found > best:
                    best, self.chosen = found, {"beta": beta, "lambda": lambda_}
        self.coefficients = self.solved(self.kernel(self.rows, self.chosen["beta"]), self.chosen["lambda"])

    def logits(self, features: Tensor) -> Tensor:
        near = self.kernel(features, self.chosen["beta"])
        return self.scale * (features @ self.texts.t() + near @ self.coefficients)

"""Classifiers and adapters on frozen features that are trained by batches, as published. Legend: see base.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.published.frozen.base import Trained, accuracy, linear, unit
from trainers.cross_modal import text_rows
from trainers.deil import POINTS


class CLIPAdapter(Trained):
    """A bottleneck behind the image encoder."""

    per_epoch = True
    sides: tuple[str, ...] = ("image",)

    @property
    def ratios(self) -> dict[str, float]:
        """The shares of the adapted features."""
        return {"image": self.settings.ratio}

    def build(self) -> Iterable[Tensor]:
        self.parts = {}
        for side in self.sides:
            down, up = (linear(self.start[f"{name}.{side}"]) for name in ("down", "up"))
            final = [nn.ReLU()] if self.settings.final_relu else []
            self.parts[side] = nn.Sequential(down, nn.ReLU(), up, *final)
        return [p for part in self.parts.values() for p in part.parameters()]

    def adapted(self, features: Tensor, side: str) -> Tensor:
        """Return features with a share of what the bottleneck makes of them, where the side has one."""
        if side not in self.sides:
            return unit(features)
        ratio = self.ratios[side]
        return unit(ratio * self.parts[side](features) + (1 - ratio) * features)

    def logits(self, features: Tensor) -> Tensor:
        return self.scale * self.adapted(features, "image") @ self.adapted(self.texts, "text").t()


class JCLIPAdapter(CLIPAdapter):
    """Bottlenecks behind both encoders."""

    per_epoch = False
    sides = ("image", "text")

    @property
    def ratios(self) -> dict[str, float]:
        return {"image": self.settings.image_ratio, "text": self.settings.text_ratio}


class TaskRes(Trained):
    """A residual on the texts."""

    per_epoch = True

    def build(self) -> Iterable[Tensor]:
        self.residual = nn.Parameter(torch.zeros_like(self.start["base"]))
        return [self.residual]

    def logits(self, features: Tensor) -> Tensor:
        texts = self.start["base"] + self.settings.alpha * self.residual
        return self.scale * unit(features) @ unit(texts).t()


class CLAP(Trained):
    """Prototypes held near the texts; each epoch copies and shuffles the features of all views."""

    per_epoch = True

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.orders = []  # all rows of an epoch, those of its batches first
        for epoch in self.epochs:
            used = torch.cat(epoch)
            rest = torch.ones(len(self.rows), dtype=torch.bool)
            rest[used] = False
            self.orders.append(torch.cat([used, rest.nonzero().flatten()]))

    def build(self) -> Iterable[Tensor]:
        base = self.start["base"]
        self.prototypes = nn.Parameter(base.clone())
        with torch.no_grad():
            right = torch.diag(self.logits(self.rows).softmax(-1).t() @ self.one_hot(self.row_labels))
            self.multipliers = right / self.one_hot(self.row_labels).sum(0)
        return [self.prototypes]

    def before_epoch(self, epoch: int) -> None:
        order = self.orders[epoch]
        self.shuffled, self.shuffled_labels, self.place = self.rows.clone()[order], self.row_labels.clone()[order], 0

    def batch(self, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        part = slice(self.place, self.place + len(rows))
        self.place += len(rows)
        return self.shuffled[part], self.shuffled_labels[part]

    def logits(self, features: Tensor) -> Tensor:
        return unit(features) @ unit(self.prototypes).t() * self.scale

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(features)
        apart = (self.prototypes - self.start["base"].clone()).pow(2).sum(-1)
        return logits, F.cross_entropy(logits, labels) + torch.mean(self.multipliers * apart)


class CrossModalProbe(Trained):
    """A linear classifier on images and as many prompts; batches are put together row by row."""

    keys = ("TEST.FINAL_MODEL", "last_step")

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.prompts, self.prompt_labels = trainer.texts.clone(), trainer.text_labels.clone()
        sizes = [len(rows) for epoch in self.epochs for rows in epoch]
        self.prompt_rows = [text_rows(len(self.prompts), n, trainer._seed, i) for i, n in enumerate(sizes)]

    def build(self) -> Iterable[Tensor]:
        self.head, self.step = linear(self.start["weight"]), 0
        return self.head.parameters()

    def batch(self, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Return a batch as a DataLoader collates it: of one row after the other."""
        listed, prompts = rows.tolist(), self.prompt_rows[self.step].tolist()
        self.step += 1
        images, texts = (torch.stack([x[i] for i in y]) for x, y in ((self.rows, listed), (self.prompts, prompts)))
        labels = (
            torch.stack([self.row_labels[i] for i in listed]),
            torch.stack([self.prompt_labels[i] for i in prompts]),
        )
        return torch.cat([images, texts]), torch.cat(labels)

    def logits(self, features: Tensor) -> Tensor:
        return self.head(F.normalize(features, dim=1)) * self.scale


class ProLIP(Trained):
    """CLIP's last matrix, on all images at once."""

    keys = ("OPTIM.MAX_EPOCH", 30)

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.penalty = trainer.penalty_weight()

    def build(self) -> Iterable[Tensor]:
        self.matrix = nn.Parameter(self.start["start"].clone())
        return [self.matrix]

    def logits(self, features: Tensor) -> Tensor:
        return self.scale * F.normalize(features @ self.matrix, dim=-1) @ self.texts.t()

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(features)
        apart = F.mse_loss(self.start["start"].view(-1), self.matrix.view(-1), reduction="sum")
        return logits, F.cross_entropy(logits, labels) + self.penalty * apart


class RLA(ProLIP):
    """A linear map behind CLIP's last matrix, of features that have gone through that."""


class AMUTuning(Trained):
    """A classifier of auxiliary features; its start adds up images one by one."""

    def build(self) -> Iterable[Tensor]:
        features, width = unit(self.views.mean(dim=0)), self.views.shape[2]
        start = torch.zeros(width, self.classes)
        for i in range(len(self.labels)):
            start[:, self.labels[i]] += features[i]
        self.head = linear((start / (len(self.labels) / self.classes)).t())
        return self.head.parameters()

    def sure(self, logits: Tensor) -> Tensor:
        """Return the kurtosis of the probabilities, [B, 1]."""
        p = logits.softmax(dim=-1)
        rows = (p - p.mean(dim=-1, keepdim=True)) / p.std(dim=-1, keepdim=True)
        return torch.mean(rows**4, dim=-1, keepdim=True)

    def both(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and the classifier's own, [B, C] each."""
        clip_logits = self.scale * unit(features @ self.start["start"]) @ self.texts.t()
        own = self.head(unit(features))
        own = (own - own.mean(dim=1, keepdim=True)) / own.std(dim=1, keepdim=True)
        most = (self.classes - 2 + 1 / (self.classes - 1)) * ((self.classes - 1) / self.classes) ** 2  # one-hot
        factor = 1 / (self.sure(clip_logits) / (most / 4)) ** self.settings.power
        return clip_logits + factor * own * self.settings.alpha, own

    def logits(self, features: Tensor) -> Tensor:
        return self.both(features)[0]

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, own = self.both(features)
        share = self.settings.lambda_
        return logits, share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(own, labels)


class FAR(Trained):
    """An adapter and a classifier with one hidden layer, beside zero-shot CLIP.

    Its gradient jumps where logits cross CLIP's (an L1 distance), so that rounding grows: 50 steps agree to 4e-7, 75 to
    7e-4, 125 to 2e-2. So there are two epochs.
    """

    keys = ("OPTIM.MAX_EPOCH", 2)

    def build(self) -> Iterable[Tensor]:
        first, second, third = (linear(self.start[f"{name}.weight"]) for name in ("adapter", "hidden", "classifier"))
        self.adapter = nn.Sequential(first, nn.BatchNorm1d(first.out_features), nn.ReLU())
        self.head = nn.Sequential(second, nn.BatchNorm1d(second.out_features), nn.ReLU(), third)
        return [*self.adapter.parameters(), *self.head.parameters()]

    def all_of(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return CLIP's logits and the classifier's, CLIP's features and the adapted ones."""
        ratio = self.settings.ratio
        plain = unit(features @ self.start["start"])
        adapted = (ratio * self.adapter(features) + (1 - ratio) * features) @ self.start["start"]
        return self.scale * plain @ self.texts.t(), self.head(adapted), plain, adapted

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        clip_logits, own, plain, adapted = self.all_of(features)
        divergence = -F.kl_div(adapted.softmax(dim=-1).log(), plain.softmax(dim=-1), reduction="batchmean")
        loss = self.settings.delta * divergence + self.settings.gamma * F.l1_loss(own, clip_logits)
        return own, loss + F.cross_entropy(own, labels)

    def search(self) -> None:
        """Choose beta."""
        self.adapter.eval()
        self.head.eval()
        best, (clip_logits, own, _, _) = 0.0, self.all_of(self.val)
        for i in range(51):
            found = accuracy(i / 50 * own + (1 - i / 50) * clip_logits, self.val_labels)
            if found > best:
                best, self.chosen = found, {"beta": i / 50}

    def logits(self, features: Tensor) -> Tensor:
        beta, (clip_logits, own, _, _) = self.chosen["beta"], self.all_of(features)
        return beta * own + (1 - beta) * clip_logits


class DeIL(Trained):
    """A head with one hidden layer beside zero-shot CLIP, and two views of each image that are compared."""

    keys = ("DATASET.CLEANING", "none")

    def build(self) -> Iterable[Tensor]:
        layer = linear(self.start["layer.weight"])
        self.layers = nn.Sequential(layer, nn.BatchNorm1d(layer.out_features), nn.GELU())
        self.head = linear(self.start["classifier.weight"])
        return [*self.layers.parameters(), *self.head.parameters()]

    def batch(self, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Return a batch in two views, one behind the other."""
        images = rows % len(self.labels)
        other = self.views[(epoch + 1) % len(self.views), images]
        return torch.cat([self.rows[rows], other]), self.labels[images]

    def fused(self, clip_logits: Tensor, own: Tensor) -> Tensor:
        """Return the classifier's logits, fused with others by their likeness to CLIP's: there are no others."""
        own = F.log_softmax(own, dim=1)
        clip_logits, own = ((x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True) for x in (clip_logits, own))
        likeness = torch.stack([(own * clip_logits).sum(dim=1, keepdim=True)], dim=-2).softmax(dim=1)
        return torch.sum(torch.stack([own], dim=-2) * likeness, dim=1)

    def at(self, clip_logits: Tensor, own: Tensor, alpha: float, beta: float) -> Tensor:
        """Return logits at a point of the grid, for the classifier's fused ones."""
        return clip_logits + alpha * (-(beta - beta * own)).exp()

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden, settings = self.layers(features), self.settings
        first, second = hidden.chunk(2)
        clip_logits = self.clip_logits(features[: len(labels)])
        logits = self.at(clip_logits, self.fused(clip_logits, self.head(first)), settings.alpha, settings.beta)
        similar = unit(first) @ unit(second).t() / 0.1
        left_out = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool)
        contrast = F.cross_entropy(similar.masked_fill(left_out, -torch.inf), torch.arange(len(labels)))
        return logits, F.cross_entropy(logits, labels) + settings.gamma * contrast

    def search(self) -> None:
        """Choose alpha and beta."""
        self.layers.eval()
        clip_logits, best = self.clip_logits(self.val), 0.0
        own = self.fused(clip_logits, self.head(self.layers(self.val)))
        alphas, betas = (
            torch.linspace(0.1, end, POINTS).tolist() for end in (self.settings.alpha_max, self.settings.beta_max)
        )
        for alpha in alphas:
            for beta in betas:
                found = accuracy(self.at(clip_logits, own, alpha, beta), self.val_labels)
                if found > best:
                    best, self.chosen = found, {"alpha": alpha, "beta": beta}

    def logits(self, features: Tensor) -> Tensor:
        clip_logits = self.clip_logits(features)
        return self.at(clip_logits, self.fused(clip_logits, self.head(self.layers(features))), **self.chosen)

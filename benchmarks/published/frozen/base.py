"""The base of published computations on frozen features: the features, a way to fit, a way to classify.

Legend: V views, N training images, n = V N rows, B images in a batch, C classes, E width of the features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainers.features.encoder import FeatureSet

OPTIMIZERS: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def accuracy(logits: Tensor, labels: Tensor, top: int = 1) -> float:
    """Return the accuracy (percent), found as the sources find it: by the largest `top` logits of each image."""
    found = logits.topk(top, 1, True, True)[1].t()
    right = found.eq(labels.view(1, -1).expand_as(found))
    return 100.0 * float(right[:1].reshape(-1).float().sum(0, keepdim=True)) / labels.shape[0]


def unit(rows: Tensor) -> Tensor:
    """Return rows divided by their lengths."""
    return rows / rows.norm(dim=-1, keepdim=True)


def linear(weight: Tensor) -> nn.Linear:
    """Return a layer without bias whose weights, which are learnt, start as a copy of these, [out, in]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone().contiguous())
    return layer


def training_rows(trainer: Any) -> list[list[Tensor]]:
    """Return which of the n rows make the batches of each epoch of a trainer: those that it will see itself."""
    loader, known = copy.copy(trainer.train_features), trainer.train_features.all()
    places = torch.arange(known.values[..., 0].numel()).view(*known.values.shape[:2], 1)
    loader._known = FeatureSet(places, known.labels, [])
    epochs = []
    for epoch in range(trainer.max_epoch):
        loader.set_epoch(epoch)
        epochs.append([batch["feature"][:, 0] for batch in loader])
    return epochs


class Published:
    """The computation of a method.

    Attributes:
        keys: configuration pairs that both computations take: smaller grids, and published settings that are not our
            default.
        cut: what the keys make smaller, for the table.
        fits: whether there is anything to compute before the test.
        probabilities: whether `logits` returns probabilities.
        chosen: what was chosen on validation images, after `fit`.
        epochs: rows of each batch of each epoch; empty where nothing is trained by batches.

    Args:
        trainer: ours, before it is trained. Nothing is shared with it but its configuration.
    """

    keys: tuple[Any, ...] = ()
    cut = ""
    fits = True
    probabilities = False

    def __init__(self, trainer: Any) -> None:
        learner, known = trainer.network.learner, trainer.train_features.all()
        self.settings, self.optim, self.scale = trainer.settings, trainer.cfg.OPTIM, float(learner.scale)
        self.start = {name: x.detach().clone() for name, x in (*learner.named_parameters(), *learner.named_buffers())}
        self.texts = self.start["zeroshot"]
        self.classes = len(self.texts)
        self.views, self.labels = known.values.clone(), known.labels.clone()
        self.rows, self.row_labels = self.views.flatten(0, 1), self.labels.repeat(len(self.views))
        self.val, self.val_labels = torch.zeros(0, self.texts.shape[1]), self.labels[:0]
        if trainer.val_loader is not None:
            self.val, self.val_labels = (x.clone() for x in (trainer.val_loader.all().values[0], _val_labels(trainer)))
        self.chosen: dict[str, float] = {}
        self.epochs: list[list[Tensor]] = []

    def fit(self) -> None:
        """Train or fit, and choose on validation images."""

    def logits(self, features: Tensor) -> Tensor:
        """Return logits, or probabilities, [n, C], for the features [n, E] of all test images."""
        raise NotImplementedError

    def clip_logits(self, features: Tensor) -> Tensor:
        """Return zero-shot logits [n, C]."""
        return self.scale * features @ self.texts.t()

    def one_hot(self, labels: Tensor) -> Tensor:
        """Return labels [n] as numbers [n, C]."""
        return F.one_hot(labels, self.classes).float()


def _val_labels(trainer: Any) -> Tensor:
    return trainer.val_loader.all().labels


class Trained(Published):
    """A method that is trained by batches; a subclass says what is learnt, and the logits and the loss of a batch.

    Attributes:
        per_epoch: whether the rate is stepped by epoch, as in trainers of Dassl.
    """

    per_epoch = False

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.epochs = training_rows(trainer)
        self.eps = trainer.eps or 1e-8

    def build(self) -> Iterable[Tensor]:
        """Build what is learnt, at its start, and return the parameters."""
        raise NotImplementedError

    def before_epoch(self, epoch: int) -> None:
        """Prepare an epoch."""

    def batch(self, rows: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the features [B, E] and labels [B] of a batch."""
        return self.rows[rows], self.row_labels[rows]

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, C] and the loss of a batch."""
        logits = self.logits(features)
        return logits, F.cross_entropy(logits, labels)

    def search(self) -> None:
        """Choose on validation images, after training."""

    def optimizer(self, parameters: Iterable[Tensor]) -> Any:
        """Build the optimizer."""
        rate, decay = self.optim.LR, self.optim.WEIGHT_DECAY
        if self.optim.NAME == "sgd":
            return torch.optim.SGD(parameters, lr=rate, momentum=self.optim.MOMENTUM, weight_decay=decay)
        return OPTIMIZERS[self.optim.NAME](parameters, lr=rate, eps=self.eps, weight_decay=decay)

    def fit(self) -> None:
        """Train, then choose."""
        optimizer = self.optimizer(self.build())
        length = len(self.epochs) if self.per_epoch else sum(map(len, self.epochs))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length)
        for number, epoch in enumerate(self.epochs):
            self.before_epoch(number)
            seen: list[float] = []
            for rows in epoch:
                features, labels = self.batch(rows, number)
                logits, loss = self.forward(features, labels)
                seen += [accuracy(logits, labels), loss.item()]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if not self.per_epoch:
                    scheduler.step()
            if self.per_epoch:
                scheduler.step()
        with torch.no_grad():
            self.search()

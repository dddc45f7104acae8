"""Doubt the labels of training images: list suspicious ones, and leave them out or correct them before training.

All of this looks at training images and their given labels only, by features of the frozen CLIP (see
../features/suspicious.py). It knows no true labels; where they are known, they only measure how good the list is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..features.cache_key import feature_slot
from ..features.encoder import ImageEncoder
from ..features.loaders import collect_features
from ..features.suspicious import LabelScores, label_scores, precision_at
from .keys import key

logger = logging.getLogger(__name__)

CLEANINGS = ("none", "drop", "relabel")
THRESHOLD = 0.8  # suspicion above which a label is not believed; chosen on development seeds, see docs/METHODS.md
HEAD = ("image", "label", "suspicion", "probability of zero-shot CLIP", "agreement of neighbors", "zero-shot CLIP says",
        "neighbors say")  # fmt: skip


@dataclass(frozen=True)
class LabelCheckKeys:
    """Keys of DATASET of all methods on a frozen CLIP."""

    suspicious: bool = key(False, "write suspicious.csv: the training images, those with the most doubtful label first")
    cleaning: str = key(
        "none",
        "what happens before training to images with a doubtful label: none, drop (they are left out) or relabel (they "
        "get the label that zero-shot CLIP and their neighbors agree on, if these agree)",
        choices=CLEANINGS,
    )


def asks_for_check(cfg: Any) -> bool:
    """Return whether a configuration asks for a check of the labels of training images."""
    return bool(cfg.DATASET.get("SUSPICIOUS", False)) or cfg.DATASET.get("CLEANING", "none") != "none"


def clean(labels: Sequence[int], scores: LabelScores, how: str, threshold: float = THRESHOLD) -> list[tuple[int, int]]:
    """Return (row, label) of each training image that stays, in order.

    A class never loses all its images: if all that have its label are doubtful, the least suspicious one keeps it.

    Args:
        labels: of the N images, as given.
        scores: of these images.
        how: drop or relabel.
        threshold: suspicion above which a label is not believed.
    """
    suspicion = scores.suspicion.tolist()
    clip, neighbors = scores.clip.tolist(), scores.neighbors.tolist()
    spared: dict[int, int] = {}  # label -> the row of its least suspicious image
    for row, label in enumerate(labels):
        if label not in spared or suspicion[row] < suspicion[spared[label]]:
            spared[label] = row
    kept = []
    for row, label in enumerate(labels):
        if suspicion[row] <= threshold or spared[label] == row:
            kept.append((row, label))
        elif how == "relabel":
            kept.append((row, clip[row] if clip[row] == neighbors[row] else label))
    return kept


class LabelCheck:
    """The scores of a run's training labels, and what was done about them.

    Args:
        dataset: its `train_x`, as they were before cleaning, were scored.
        scores: the scores.
        listed: whether the list of suspicious images is wanted.
        true_labels: [N], where labels were made wrong on purpose; they measure, and decide nothing.
    """

    def __init__(
        self, dataset: Any, scores: LabelScores, listed: bool = True, true_labels: Sequence[int] | None = None
    ) -> None:
        self.items = list(dataset.train_x)
        self.names = list(dataset.classnames)
        self.scores = scores
        self.listed = listed
        self.true = true_labels
        self.cleaning: dict[str, Any] = {}

    def decide(self, how: str) -> list[tuple[int, int]]:
        """Return (row, label) of the images to train on, and note how many are dropped or relabeled."""
        labels = [item.label for item in self.items]
        kept = clean(labels, self.scores, how)
        changed = sum(label != labels[row] for row, label in kept)
        self.cleaning = {
            "how": how,
            "threshold": THRESHOLD,
            "images": len(labels),
            "dropped": len(labels) - len(kept),
            "relabeled": changed,
        }
        if self.true is not None:
            self.cleaning["wrong_before"] = sum(self._wrong(self.true))
            self.cleaning["wrong_after"] = sum(label != self.true[row] for row, label in kept)
        logger.info(
            "Cleaning (%s): of %d training images %d are left out and %d get another label (suspicion above %g)",
            how, len(labels), len(labels) - len(kept), changed, THRESHOLD,
        )  # fmt: skip
        return kept

    def _wrong(self, true_labels: Sequence[int]) -> list[bool]:
        return [item.label != label for item, label in zip(self.items, true_labels, strict=True)]

    def notes(self) -> dict[str, Any]:
        """Return entries for metrics.json: "suspicious", if there is a list, and "cleaning", if there was any."""
        found: dict[str, Any] = {"cleaning": self.cleaning} if self.cleaning else {}
        if self.listed:
            above = self.scores.suspicion > THRESHOLD
            suspicious: dict[str, Any] = {
                "images": len(self.items),
                "above_threshold": int(above.sum()),
                "threshold": THRESHOLD,
            }
            if self.true is not None and any(self._wrong(self.true)):
                wrong = torch.tensor(self._wrong(self.true), device=above.device)
                suspicious |= {
                    "wrong": int(wrong.sum()),
                    "precision": precision_at(self.scores.order(), wrong),
                    "precision_above": 100 * float(wrong[above].float().mean()) if above.any() else None,
                    "recall_above": 100 * float(above[wrong].float().mean()),
                }
            found["suspicious"] = suspicious
        return found

    def tables(self) -> dict[str, Sequence[Sequence[Any]]]:
        """Return the CSV files to write: suspicious.csv, the head first, if there is a list."""
        if not self.listed:
            return {}
        scores = self.scores
        columns = zip(
            *(part.tolist() for part in (scores.suspicion, scores.probability, scores.agreement)),
            *([self.names[label] for label in part.tolist()] for part in (scores.clip, scores.neighbors)),
            strict=True,
        )
        rows = [
            (item.impath, item.classname, *(f"{value:.4f}" for value in values[:3]), *values[3:])
            for item, values in zip(self.items, columns, strict=True)
        ]
        return {"suspicious.csv": [HEAD, *(rows[row] for row in scores.order().tolist())]}


def check_labels(cfg: Any, dm: Any, encoder: ImageEncoder, loader: DataLoader[Any], zeroshot: Tensor) -> LabelCheck:
    """Score the labels of the training images, and clean the training images if the configuration says so.

    Args:
        cfg: the configuration.
        dm: the run's data manager; cleaning changes its dataset's `train_x` and its `train_loader_x`.
        encoder: the frozen CLIP; features come from the cache where they are there.
        loader: gives the training images in order, as they are at test time.
        zeroshot: weights [C, E] of zero-shot CLIP, normalized.

    Raises:
        ValueError: the data manager cannot follow cleaning.
    """
    dataset, how = dm.dataset, cfg.DATASET.get("CLEANING", "none")
    if how != "none" and not hasattr(dm, "keep_training"):
        raise ValueError(
            f"Expected DATASET.CLEANING to be none with {type(dm).__name__}, which has no keep_training, but got {how}"
        )
    logger.info("Checking the labels of %d training images by features of the frozen CLIP", len(dataset.train_x))
    known = collect_features(loader, encoder, 1, feature_slot(cfg, encoder, loader, "train"))
    scores = label_scores(known.values[0], known.labels, zeroshot, encoder.clip.logit_scale)
    noise = getattr(dm, "noise", None)
    listed = bool(cfg.DATASET.get("SUSPICIOUS", False))
    check = LabelCheck(dataset, scores, listed, None if noise is None else noise.true_labels)
    if how != "none":
        dm.keep_training(check.decide(how))
    return check

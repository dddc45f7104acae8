"""Cross-validate methods on few images: each image is classified by a classifier that has not seen it.

Legend: N images, C classes, K folds.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from dassl.config import CfgNode
from dassl.data.datasets import Datum

from .runs import Runner, draw_validation, logits_of

MOST_FOLDS = 5


def draw_folds(labels: Sequence[int], seed: int, most: int = MOST_FOLDS) -> Tensor:
    """Return the fold of each image, [N]; -1: it is the only one of its class, and is never held out.

    A fold has about as many images of each class as the others. There are `most` folds, or as many as the largest class
    has images. Two images of a class are in two folds, so that one of them is always there to learn from.
    """
    counts = Counter(labels)
    folds = max(2, min(most, max(counts.values())))
    rng = random.Random(seed)
    found = torch.full((len(labels),), -1)
    for place, label in enumerate(sorted(counts)):
        mine = [row for row, other in enumerate(labels) if other == label]
        rng.shuffle(mine)
        if len(mine) > 1:
            found[mine] = (torch.arange(len(mine)) + place) % folds
    return found


def numbers_of(folds: Tensor) -> list[int]:
    """Return the numbers of the folds that hold images out, in order."""
    return sorted(set(folds.tolist()) - {-1})


def held_out_logits(
    runner: Runner, cfg: CfgNode, items: Sequence[Datum], folds: Tensor, share: float, most: int = 0
) -> Tensor:
    """Return logits [N, C] of each image from the run that it was held out of; NaN where an image never is.

    Args:
        runner, cfg: how to train.
        items: N images.
        folds: [N], see `draw_folds`.
        share: of the training images that are taken for validation, where a class has enough.
        most: images of each class to train on; 0: all.
    """
    out = torch.full((len(items), len({item.label for item in items})), float("nan"))
    for fold in numbers_of(folds):
        here = folds == fold
        train = [item for item, held in zip(items, here.tolist(), strict=True) if not held]
        test = [item for item, held in zip(items, here.tolist(), strict=True) if held]
        if most:
            train = first_of_each(train, most)
        parts = (*draw_validation(train, share, runner.seed), test)
        out[here] = logits_of(runner.train(cfg, parts))[0]
    return out


def first_of_each(items: Sequence[Datum], most: int) -> list[Datum]:
    """Return the first `most` items of each class."""
    seen: Counter[int] = Counter()
    kept = []
    for item in items:
        if seen[item.label] < most:
            kept.append(item)
        seen[item.label] += 1
    return kept


def without_classes(
    runner: Runner, cfg: CfgNode, items: Sequence[Datum], folds: Tensor, share: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Leave classes out of training, a group at a time, and classify their images beside held-out images of the others.

    Each class is in one of at most five groups. At least two classes are always trained on.

    Args:
        runner, cfg, items, folds, share: see `held_out_logits`.

    Returns:
        Logits [n, c] of held-out images of the c classes trained on, and those of images of left-out classes; one
        tensor for each group. Both lists are empty where there are fewer than three classes.
    """
    names = {item.label: item.classname for item in items}
    labels, numbers = sorted(names), numbers_of(folds)
    groups = min(MOST_FOLDS, len(labels))
    known, unknown = [], []
    for group in range(groups if len(labels) > 2 and numbers else 0):
        left_out, fold = set(labels[group::groups]), numbers[group % len(numbers)]
        place = {label: number for number, label in enumerate(label for label in labels if label not in left_out)}
        train: list[Datum] = []
        test: list[Datum] = []
        strange: list[Datum] = []
        for item, its in zip(items, folds.tolist(), strict=True):
            if item.label in left_out:  # the label does not count, but there must be one
                strange.append(Datum(item.impath, 0, classname=names[next(iter(place))]))
            else:
                mine = Datum(item.impath, place[item.label], classname=item.classname)
                (test if its == fold else train).append(mine)
        parts = (*draw_validation(train, share, runner.seed), [*test, *strange])
        logits = logits_of(runner.train(cfg, parts))[0]
        known.append(logits[: len(test)])
        unknown.append(logits[len(test) :])
    return known, unknown

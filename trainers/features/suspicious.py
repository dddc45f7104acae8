"""Score how much the labels of training images are to be doubted, by frozen features alone.

Two witnesses are asked of each image: zero-shot CLIP, which has seen no label, and the image's nearest neighbors among
the other training images, which show what their labels say of such an image. This is ours, not a published method.

Legend: N images, C classes, E width of the features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBORS = 5  # at most so many; a class with fewer other images asks as many as it has
_ROWS = 1024  # images whose similarities to all others are in memory at a time


class LabelScores(NamedTuple):
    """Hold what speaks for each label.

    Attributes:
        probability: [N], which zero-shot CLIP gives to the image's label.
        agreement: [N], share of the nearest other images that have its label; where no other image has that label, the
            probability takes its place.
        suspicion: [N], 1 less the mean of the two; from 0 (none) to 1.
        clip: [N], the class that zero-shot CLIP predicts.
        neighbors: [N], the class that most of the nearest other images have; zero-shot CLIP breaks ties.
    """

    probability: Tensor
    agreement: Tensor
    suspicion: Tensor
    clip: Tensor
    neighbors: Tensor

    def order(self) -> Tensor:
        """Return the rows [N], most suspicious first; of two alike, the first comes first."""
        return self.suspicion.argsort(descending=True, stable=True)


@torch.no_grad()
def label_scores(
    features: Tensor, labels: Tensor, zeroshot: Tensor, scale: float, neighbors: int = NEIGHBORS
) -> LabelScores:
    """Score the labels of training images.

    An image asks its k nearest other images, by cosine similarity. k is `neighbors`, or the number of other images with
    its label, if that is smaller: with few images of each class, more neighbors could not all agree.

    Args:
        features: [N, E], normalized.
        labels: [N].
        zeroshot: weights [C, E] of zero-shot CLIP, normalized.
        scale: what CLIP multiplies cosines with.
        neighbors: see above.
    """
    n, classes = len(labels), len(zeroshot)
    probabilities = torch.softmax(scale * features @ zeroshot.T, dim=1)
    probability = probabilities.gather(1, labels[:, None])[:, 0]
    alike = torch.bincount(labels, minlength=classes)[labels] - 1
    asked = min(neighbors, n - 1)
    votes = torch.zeros_like(probabilities)
    if asked > 0:
        nearest = []
        for rows in torch.arange(n, device=labels.device).split(_ROWS):
            similar = features[rows] @ features.T
            similar[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
            nearest.append(similar.topk(asked, dim=1).indices)
        rank = torch.arange(asked, device=labels.device)
        counted = rank < alike.clamp(min=1)[:, None]
        one_hot = F.one_hot(labels[torch.cat(nearest)], classes).to(votes)  # [N, k, C]
        votes = (one_hot * counted[:, :, None]).sum(dim=1)
    shares = votes.gather(1, labels[:, None])[:, 0] / votes.sum(dim=1).clamp(min=1)
    agreement = torch.where(alike > 0, shares, probability)
    return LabelScores(
        probability,
        agreement,
        1 - (probability + agreement) / 2,
        probabilities.argmax(dim=1),
        (votes + probabilities).argmax(dim=1),
    )


def precision_at(order: Tensor, wrong: Tensor) -> float:
    """Return the percentage of wrong labels among as many images at the head of a list as there are wrong ones.

    Args:
        order: [N], rows, most suspicious first.
        wrong: [N], whether the label of each row is wrong; at least one is.
    """
    count = int(wrong.sum())
    return 100 * float(wrong[order[:count]].float().mean())

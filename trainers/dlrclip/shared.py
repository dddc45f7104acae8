"""The class-agnostic form of GLR and of the fusion gate: the weights do not depend on which classes there are.

Nor do they depend on the number of classes. Both see logits through statistics: when the classes change places, a
statistic changes places with them, or stays as it is. Each shares one small network over all classes. What they learnt
on one class list they apply to any other.

Legend: B images, C classes, E width of the joint embedding, d feature size, k statistics of a class. Logits are fp32
and multiplied by CLIP's scale. The size of their differences depends on that scale; asinh keeps it within a few units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .glr import Refiner

# Softens cosines of class names to weights of neighbors: a difference of 0.1 counts for a factor of e^2.
NEIGHBOR_TEMPERATURE = 0.05
BRANCH_STATISTICS = 6
PAIR_STATISTICS = 2
TOP = 5  # strongest probabilities that the fusion gate sees
FUSION_STATISTICS = TOP + 3


def neighbor_weights(text_features: Tensor, temperature: float = NEIGHBOR_TEMPERATURE) -> Tensor:
    """Return S [C, C], how close the other classes are by name: softmax(W W^T / t) without the class itself.

    Args:
        text_features: W [C, E], normalized.
        temperature: t > 0.

    Returns:
        Rows that sum to one; for a single class, which has no neighbor, 0.
    """
    if len(text_features) == 1:
        return text_features.new_zeros(1, 1)
    similarity = text_features @ text_features.t() / temperature
    return F.softmax(similarity.fill_diagonal_(-math.inf), dim=1)


def _entropy(log_p: Tensor) -> Tensor:
    """Return the entropy [B, 1] of log-probabilities [B, C], as a share in [0, 1] of the largest possible."""
    return -(log_p.exp() * log_p).sum(dim=1, keepdim=True) / math.log(max(log_p.shape[1], 2))


def _rival(logits: Tensor) -> Tensor:
    """Return for each class the largest logit of the others, [B, C]; a single class gets its own."""
    if logits.shape[1] == 1:
        return logits
    first, second = logits.topk(2, dim=1).values.split(1, dim=1)
    return torch.where(logits == first, second, first)


def branch_statistics(logits: Tensor, neighbors: Tensor) -> Tensor:
    """Return six statistics of each class within one branch.

    They are the probability of the class; its lead over the strongest other class, over the mean and over its
    neighbors by name; its neighbors' probability; and the image's entropy, which is the same for all classes.

    Args:
        logits: [B, C].
        neighbors: S [C, C], see `neighbor_weights`.

    Returns:
        [B, C, 6]; permuting the classes permutes the statistics.
    """
    log_p = F.log_softmax(logits, dim=1)
    p = log_p.exp()
    around = logits @ neighbors.t() if len(neighbors) > 1 else logits
    statistics = (
        p,
        torch.asinh(logits - _rival(logits)),
        torch.asinh(logits - logits.mean(dim=1, keepdim=True)),
        torch.asinh(logits - around),
        p @ neighbors.t(),
        _entropy(log_p).expand_as(p),
    )
    return torch.stack(statistics, dim=2)


def pair_statistics(clip_logits: Tensor, cma_logits: Tensor) -> Tensor:
    """Return two statistics [B, C, 2] of how the branches differ, from their logits [B, C].

    The first is what the second branch adds to the lead of a class over the mean. The second is how far the branches
    agree on the image, the same for all classes. Permuting the classes permutes the statistics.
    """
    lead = [logits - logits.mean(dim=1, keepdim=True) for logits in (clip_logits, cma_logits)]
    half = 0.5 * (F.log_softmax(clip_logits, dim=1) + F.log_softmax(cma_logits, dim=1))
    agreement = half.exp().sum(dim=1, keepdim=True)  # Bhattacharyya coefficient, 1 = equal
    return torch.stack([torch.asinh(lead[1] - lead[0]), agreement.expand_as(half)], dim=2)


class SharedRefiner(Refiner):
    """GLR with one network for all classes; z and y below are the statistics of one class.

        f_clip = CR_1(gelu(P1 z_clip))              f_cma = CR_2(gelu(P2 [y_cma, pair]))
        alpha  = sigmoid(Q2 relu(Q1 sum_c p_c f_clip,c))    p = softmax(clip_logits): the gate sees the clip side only
        glr_logits_c = clip_logits_c + res_scale * H LayerNorm(f_clip + alpha * f_cma)

    H (d -> 1) starts at zero, so that at initialization glr_logits is clip_logits exactly.

    Args:
        dim: feature size d.
        res_scale: initial value of the learnable residual scale.
        fixed_alpha: a number in [0, 1] that replaces the gate (which then has no parameters); None: learn it.
    """

    def __init__(self, *, dim: int = 64, res_scale: float = 0.01, fixed_alpha: float | None = None) -> None:
        super().__init__(BRANCH_STATISTICS, BRANCH_STATISTICS + PAIR_STATISTICS, 1, dim, res_scale, fixed_alpha)

    def forward(self, clip_logits: Tensor, cma_logits: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor]:
        """Return (glr_logits [B, C], alpha [B, 1]) in fp32, for both branches' logits [B, C] and S [C, C]."""
        with torch.autocast(device_type=clip_logits.device.type, enabled=False):
            clip_logits, cma_logits = clip_logits.float(), cma_logits.float()
            of_clip = branch_statistics(clip_logits, neighbors)
            of_cma = branch_statistics(cma_logits, neighbors)
            of_cma = torch.cat([of_cma, pair_statistics(clip_logits, cma_logits)], dim=2)
            f_clip = self.recalibrate_clip(F.gelu(self.project_clip(of_clip)))  # [B, C, d]
            f_cma = self.recalibrate_cma(F.gelu(self.project_cma(of_cma)))
            if self.gate is None:
                alpha = clip_logits.new_full((len(clip_logits), 1), self.fixed_alpha or 0.0)
            else:
                p = F.softmax(clip_logits, dim=1)
                alpha = self.gate((p.unsqueeze(2) * f_clip).sum(dim=1))
            delta = self.head(self.norm(f_clip + alpha.unsqueeze(2) * f_cma)).squeeze(2)
            return clip_logits + self.res_scale * delta, alpha


def fusion_statistics(logits: Tensor) -> Tensor:
    """Return eight statistics [B, 8] of logits [B, C] that apply to any order and number of classes.

    They are the five largest probabilities (0 where there are fewer classes), the lead of the strongest class over the
    second and over the mean, and the entropy.
    """
    log_p = F.log_softmax(logits, dim=1)
    values = logits.topk(min(2, logits.shape[1]), dim=1).values
    top = log_p.exp().topk(min(TOP, logits.shape[1]), dim=1).values
    leads = (values[:, :1] - values[:, -1:], values[:, :1] - logits.mean(dim=1, keepdim=True))
    return torch.cat([F.pad(top, (0, TOP - top.shape[1])), *(torch.asinh(v) for v in leads), _entropy(log_p)], dim=1)


class SharedFusion(nn.Module):
    """w = sigmoid(F2 relu(F1 statistics of cma_logits)): the fusion gate for any class list."""

    def __init__(self, *, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FUSION_STATISTICS, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid())

    def forward(self, cma_logits: Tensor) -> Tensor:
        """Return w [B, 1] in fp32 for cma_logits [B, C]."""
        with torch.autocast(device_type=cma_logits.device.type, enabled=False):
            return self.layers(fusion_statistics(cma_logits.float()))

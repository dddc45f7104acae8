"""The mixture of DLR-CLIP's branches: the head `mixed`.

    mixed = sum_k v_k logits_k          v_k > 0, one number for each branch

The weights maximize the likelihood of few validation images, which no branch was trained on, and of a small part of an
image that may be of any class: without it, weights would grow without end where all images are classified rightly. A
ridge keeps the weights near a starting point. There each branch has its own best temperature, and a share of the whole
that grows with the probability that it gives to the right class:

    v_k = s_k T_k          s_k ~ (geometric mean over the images of softmax(T_k logits_k)[right class])^3

The mixture is believed as far as the images speak for it against the safest branch, zero-shot CLIP:

    v <- r v + (1 - r) T_1 e_1          r = sigmoid(G - 1), G the gain in log-likelihood of all images together

So where zero-shot CLIP is as good, zero-shot CLIP it is.

Legend: n images, C classes, K branches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .prototypes import best_temperature, doubtful_cross_entropy

SHARPNESS = 3.0  # power of the mean probability of the right class in a branch's first share
DOUBT = 1.0  # gain in log-likelihood at which the mixture is believed as much as zero-shot CLIP


class Mixture(nn.Module):
    """The mixture that the head of this file describes. Until it is fitted, it gives the first branch's logits.

    Args:
        branches: names of the branches; the first is the safest one.
        ridge: weight of the squared relative distance from the starting point, beside the negative log-likelihood of
            all images together.
    """

    weights: Tensor  # [K]
    count: Tensor  # images that the weights were fitted to; 0: not fitted
    left_out: Tensor  # whether these were training images, each left out in turn

    def __init__(self, branches: Sequence[str], ridge: float) -> None:
        super().__init__()
        self.branches = tuple(branches)
        self.ridge = ridge
        self.register_buffer("weights", torch.zeros(len(self.branches)))
        self.weights[0] = 1.0
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("left_out", torch.tensor(False))

    def forward(self, logits: Mapping[str, Tensor]) -> Tensor:
        """Return mixed logits [n, C] in fp32, for the logits [n, C] of all branches by name."""
        terms = [weight * logits[name].float() for name, weight in zip(self.branches, self.weights, strict=True)]
        return torch.stack(terms).sum(dim=0)

    def fit(self, logits: Mapping[str, Tensor], labels: Tensor, left_out: bool = False) -> None:
        """Fit the weights of those branches that are given; the others get 0.

        Args:
            logits: [n, C], by name, of images that no branch was trained on.
            labels: [n].
            left_out: whether they are training images, each left out in turn.

        Raises:
            ValueError: there is no image, or no branch.
        """
        given = [name for name in self.branches if name in logits]
        if not given or not len(labels):
            raise ValueError(f"Expected images and branches to fit a mixture to but got {len(labels)} and {given}")
        alone = torch.tensor([best_temperature(logits[name].double(), labels) for name in given], dtype=torch.float64)
        start = (alone[:, 0] * torch.softmax(-SHARPNESS * alone[:, 1], dim=0)).to(labels.device)
        scaled = torch.stack([logits[name].double() for name in given]) * start[:, None, None]
        raw = torch.full_like(start, math.log(math.e - 1)).requires_grad_()  # softplus(raw) = 1
        optim = torch.optim.LBFGS([raw], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optim.zero_grad()
            factors = F.softplus(raw)
            entropy = doubtful_cross_entropy((factors[:, None, None] * scaled).sum(dim=0), labels)
            total = (entropy + self.ridge * (factors - 1).square().sum()) / len(labels)
            total.backward()
            return total

        with torch.enable_grad():
            optim.step(loss)
        weights = F.softplus(raw.detach()) * start
        if given[0] == self.branches[0]:
            mixed = (weights[:, None, None] * torch.stack([logits[name].double() for name in given])).sum(dim=0)
            gain = len(labels) * float(alone[0, 1] - F.cross_entropy(mixed, labels))
            belief = 1 / (1 + math.exp(DOUBT - gain)) if gain > DOUBT - 100 else 0.0
            weights = belief * weights
            weights[0] += (1 - belief) * alone[0, 0]
        fitted = dict(zip(given, weights.tolist(), strict=True))
        self.weights.copy_(torch.tensor([fitted.get(name, 0.0) for name in self.branches]))
        self.count.fill_(len(labels))
        self.left_out.fill_(left_out)

    def share(self, giver: str, taker: str) -> None:
        """Give half of one branch's weight to another branch, where there is one of that name."""
        if taker in self.branches:
            half = self.weights[self.branches.index(giver)] / 2
            self.weights[self.branches.index(giver)] = half
            self.weights[self.branches.index(taker)] = half

    def chosen(self) -> dict[str, float]:
        """Return the weight of each branch, by name."""
        return dict(zip(self.branches, self.weights.tolist(), strict=True))

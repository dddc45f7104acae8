"""The robust head of DLR-CLIP: it takes more of the adapted branch, the more that branch can be trusted on an image.

    robust = r * final + (1 - r) * clip         r = sigmoid(c_0 + c . x), the trust [B, 1]

x are signs of reliability that need no label: how far the image lies from the training images, how sure both heads are,
and how far they agree. c_0 and c are fitted after training to validation images and corruptions of them
(pseudo_shifts.py); nothing else of the model changes.

Legend: B images, C classes, E width of the joint embedding, N training images, K signs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .glr import fuse

NEIGHBORS = 5  # training images whose mean distance counts; fewer where there are fewer
SIGNS = ("distance", "clip_entropy", "final_entropy", "agreement", "clip_lead", "final_lead")
CHUNK = 1024  # images compared with all training images at once
RIDGE = 0.01  # weight of the squared coefficients against the cross-entropy; they are drawn to r = 1/2


class Evidence(NamedTuple):
    """One group of calibration images.

    Attributes:
        frozen: normalized zero-shot features [B, E].
        clip, final: logits [B, C].
        labels: [B].
    """

    frozen: Tensor
    clip: Tensor
    final: Tensor
    labels: Tensor


def neighbor_distance(features: Tensor, bank: Tensor, itself: bool = False) -> Tensor:
    """Return the mean cosine distance [B] of features to the nearest NEIGHBORS rows of the bank.

    Args:
        features: [B, E], normalized.
        bank: [N, E], normalized.
        itself: whether row i of `features` is row i of the bank; a row does not count as its own neighbor.
    """
    k, parts = min(NEIGHBORS, len(bank) - itself), []
    for start in range(0, len(features), CHUNK):
        similarity = features[start : start + CHUNK] @ bank.t()
        if itself:
            row = torch.arange(len(similarity), device=similarity.device)
            similarity[row, start + row] = -math.inf
        parts.append(similarity.topk(k, dim=1).values.mean(dim=1))
    return 1 - torch.cat(parts)


def _sureness(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities [B, C], entropy [B] and the lead [B] of the strongest class.

    The entropy is a share of the largest possible; the lead is over the second class, through asinh.
    """
    log_p = F.log_softmax(logits, dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1) / math.log(max(log_p.shape[1], 2))
    top = logits.topk(min(2, logits.shape[1]), dim=1).values
    return log_p, entropy, torch.asinh(top[:, 0] - top[:, -1])


class RobustMixture(nn.Module):
    """The mixture that the head of this file describes. It has buffers only: nothing of it is trained with the rest."""

    bank: Tensor  # [N, E] frozen features of the training images, half precision; N = 0: none known
    typical: Tensor  # median leave-one-out distance among them
    centre: Tensor  # [K] mean of the signs over the calibration images
    spread: Tensor  # [K] their standard deviation
    coefficients: Tensor  # [1 + K]: c_0, c; zeros, so that r = 1/2, until they are fitted
    count: Tensor  # validation images they were fitted to; 0: not fitted

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("bank", torch.empty(0, width, dtype=torch.float16))
        self.register_buffer("typical", torch.tensor(1.0))
        self.register_buffer("centre", torch.zeros(len(SIGNS)))
        self.register_buffer("spread", torch.ones(len(SIGNS)))
        self.register_buffer("coefficients", torch.zeros(1 + len(SIGNS)))
        self.register_buffer("count", torch.tensor(0))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Load the buffers, after making room for as many training images as the checkpoint has."""
        bank = state_dict.get(f"{prefix}bank")
        if isinstance(bank, Tensor) and bank.shape[1:] == self.bank.shape[1:]:
            self.bank = self.bank.new_empty(bank.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def remember(self, features: Tensor) -> None:
        """Remember the frozen features [N, E] of the training images, and how far apart they typically are."""
        self.bank = features.to(self.bank)
        kept = self.bank.float()
        if len(kept) > 1:
            self.typical = neighbor_distance(kept, kept, itself=True).median()

    def signs(self, frozen: Tensor, clip_logits: Tensor, final_logits: Tensor) -> Tensor:
        """Return the signs [B, K], in the order of SIGNS, for frozen features [B, E] and two logits [B, C]."""
        clip_log_p, clip_entropy, clip_lead = _sureness(clip_logits)
        final_log_p, final_entropy, final_lead = _sureness(final_logits)
        distance = torch.zeros_like(clip_lead)
        if len(self.bank):
            far = neighbor_distance(frozen, self.bank.float())
            distance = torch.log(far.clamp(min=1e-4) / self.typical.clamp(min=1e-4))
        agreement = (0.5 * (clip_log_p + final_log_p)).exp().sum(dim=1)
        return torch.stack([distance, clip_entropy, final_entropy, agreement, clip_lead, final_lead], dim=1)

    def _standardize(self, signs: Tensor) -> Tensor:
        """Standardize signs [B, K], and cut them off at three deviations: beyond, the fit saw next to nothing."""
        return ((signs - self.centre) / self.spread).clamp(-3, 3)

    def forward(self, frozen: Tensor, clip_logits: Tensor, final_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return (robust logits [B, C], r [B, 1]) in fp32, for frozen features [B, E] and two logits [B, C]."""
        with torch.autocast(device_type=clip_logits.device.type, enabled=False):
            x = self._standardize(self.signs(frozen.float(), clip_logits, final_logits))
            r = torch.sigmoid(self.coefficients[0] + x @ self.coefficients[1:]).unsqueeze(1)
            return fuse(final_logits, clip_logits, r), r

    def fit(self, groups: Sequence[Evidence]) -> None:
        """Fit c_0 and c by cross-entropy, in which the first group counts as much as all others together.

        So the images as they are weigh as much as the corrupted ones. The logits are divided by exp(t_0 + t . x); t_0
        and t are fitted with the coefficients and then forgotten, because r has to say which branch to believe, not how
        far to believe either. (With one temperature for all images, r would move to the branch of smaller logits
        wherever both are often wrong.)

        Args:
            groups: the validation images as they are, and then under each corruption.
        """
        signs = [self.signs(g.frozen, g.clip, g.final) for g in groups]
        together = torch.cat(signs)
        self.centre, self.spread = together.mean(dim=0), together.std(dim=0, correction=0).clamp(min=1e-3)
        xs = [self._standardize(x).double() for x in signs]
        coefficients, softening = (
            torch.zeros(1 + len(SIGNS), dtype=torch.float64, device=together.device, requires_grad=True)
            for _ in range(2)
        )
        optim = torch.optim.LBFGS([coefficients, softening], max_iter=300, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optim.zero_grad()
            terms = []
            for x, g in zip(xs, groups, strict=True):
                r = torch.sigmoid(coefficients[0] + x @ coefficients[1:]).unsqueeze(1)
                soft = torch.exp(softening[0] + x @ softening[1:]).unsqueeze(1)
                terms.append(F.cross_entropy(fuse(g.final.double(), g.clip.double(), r) / soft, g.labels))
            mean = terms[0] if len(terms) == 1 else (terms[0] + torch.stack(terms[1:]).mean()) / 2
            total = mean + RIDGE * (coefficients.square().sum() + softening[1:].square().sum())
            total.backward()
            return total

        with torch.enable_grad():
            optim.step(loss)
        self.coefficients = coefficients.detach().float()
        self.count.fill_(len(groups[0].labels))

    def chosen(self) -> dict[str, float]:
        """Return by name the fitted coefficients, which apply to standardized signs."""
        return dict(zip(("bias", *SIGNS), self.coefficients.tolist(), strict=True))

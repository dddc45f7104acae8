"""GLR, the gate logit refiner of DLR-CLIP, and the fusion of the two branches.

Legend: B images, C classes, d feature size of the refiner. Logits are fp32 and already multiplied by CLIP's scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base.search import best_place

BETA_GRID: tuple[float, ...] = tuple(i / 50 for i in range(51))  # {0, 0.02, ..., 1}


class ChannelRecalibration(nn.Module):
    """CR(z) = z * sigmoid(A2 relu(A1 z)), d -> d/8 -> d, no biases: a squeeze-and-excitation gate on a vector."""

    def __init__(self, dim: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = max(1, dim // reduction)
        self.squeeze = nn.Linear(dim, hidden, bias=False)
        self.excite = nn.Linear(hidden, dim, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        """Return the gated vectors [B, d] for z [B, d]."""
        return z * torch.sigmoid(self.excite(F.relu(self.squeeze(z))))


class Refiner(nn.Module):
    """The layers of a gated residual on logits, for any widths of input and output; subclasses define `forward`.

    Args:
        clip_inputs, cma_inputs: widths of the inputs of P1 and P2.
        outputs: width of the output of H.
        dim, res_scale, fixed_alpha: see GateLogitRefiner.
    """

    def __init__(
        self, clip_inputs: int, cma_inputs: int, outputs: int, dim: int, res_scale: float, fixed_alpha: float | None
    ) -> None:
        super().__init__()
        self.fixed_alpha = fixed_alpha
        self.project_clip = nn.Linear(clip_inputs, dim)
        self.project_cma = nn.Linear(cma_inputs, dim)
        self.recalibrate_clip = ChannelRecalibration(dim)
        self.recalibrate_cma = ChannelRecalibration(dim)
        self.gate: nn.Module | None = None
        if fixed_alpha is None:
            hidden = max(1, dim // 4)
            self.gate = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid())
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.res_scale = nn.Parameter(torch.tensor(float(res_scale)))


class GateLogitRefiner(Refiner):
    """A gated residual on the zero-shot logits, learnt from both branches' logits.

        f_clip = CR_1(gelu(P1 clip_logits))         f_cma = CR_2(gelu(P2 cma_logits))
        alpha  = sigmoid(Q2 relu(Q1 f_clip))        the gate sees f_clip only: it is asymmetric
        glr_logits = clip_logits + res_scale * H LayerNorm(f_clip + alpha * f_cma)

    H starts at zero, so that at initialization glr_logits is clip_logits exactly.

    Args:
        num_classes: C.
        dim: feature size d.
        res_scale: initial value of the learnable residual scale.
        fixed_alpha: a number in [0, 1] that replaces the gate (which then has no parameters); None: learn it.
    """

    def __init__(
        self, num_classes: int, *, dim: int = 512, res_scale: float = 0.01, fixed_alpha: float | None = None
    ) -> None:
        super().__init__(num_classes, num_classes, num_classes, dim, res_scale, fixed_alpha)

    def forward(self, clip_logits: Tensor, cma_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return (glr_logits [B, C], alpha [B, 1]) in fp32, for both branches' logits [B, C]."""
        with torch.autocast(device_type=clip_logits.device.type, enabled=False):
            clip_logits, cma_logits = clip_logits.float(), cma_logits.float()
            f_clip = self.recalibrate_clip(F.gelu(self.project_clip(clip_logits)))
            f_cma = self.recalibrate_cma(F.gelu(self.project_cma(cma_logits)))
            if self.gate is None:
                alpha = f_clip.new_full((len(f_clip), 1), self.fixed_alpha or 0.0)
            else:
                alpha = self.gate(f_clip)
            delta = self.head(self.norm(f_clip + alpha * f_cma))
            return clip_logits + self.res_scale * delta, alpha


class FusionGate(nn.Module):
    """w = sigmoid(F2 relu(F1 cma_logits)), C -> hidden -> 1: the weight of the adapted branch for an image."""

    def __init__(self, num_classes: int, *, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(num_classes, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid())

    def forward(self, cma_logits: Tensor) -> Tensor:
        """Return w [B, 1] in fp32 for cma_logits [B, C]."""
        with torch.autocast(device_type=cma_logits.device.type, enabled=False):
            return self.layers(cma_logits.float())


def fuse(cma_logits: Tensor, glr_logits: Tensor, weight: Tensor | float) -> Tensor:
    """Return weight * cma_logits + (1 - weight) * glr_logits, for logits [B, C] and weight [B, 1] or a number."""
    return weight * cma_logits + (1 - weight) * glr_logits


class Beta(NamedTuple):
    """A chosen fusion coefficient and its accuracy (percent) on the images it was chosen on."""

    value: float
    accuracy: float


def best_beta(
    cma_logits: Tensor, glr_logits: Tensor, labels: Tensor, prefer: float, grid: tuple[float, ...] = BETA_GRID
) -> Beta:
    """Return the beta of `grid` whose fused logits classify most images correctly; of ties, the nearest to `prefer`.

    Args:
        cma_logits, glr_logits: [B, C].
        labels: [B], class numbers.
        prefer: the mean learnt fusion weight; or 0, for the smallest beta.

    Raises:
        ValueError: there is no image.
    """
    if len(labels) == 0:
        raise ValueError("Expected at least one image to choose beta on but got none")
    correct = [int((fuse(cma_logits, glr_logits, b).argmax(dim=1) == labels).sum()) for b in grid]
    (place,) = best_place(torch.tensor(correct), lambda at: (abs(grid[at[0]] - prefer), grid[at[0]]))
    return Beta(grid[place], 100.0 * correct[place] / len(labels))

"""Train one matrix that image features go through, and hold it near where it starts.

    logits = s normalize(x M + b) T^T        loss = CE(logits) + lambda |M - M_0|^2        lambda = LAMBDA / S^POWER

The penalty is the squared Frobenius norm. M sees no classes, so that any class list can be classified.

Legend: B images, C classes, P width of the features x, E width of the joint embedding, S images per class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clip import CLIP, IMAGENET_TEMPLATES_SELECT
from .feature_learner import FeatureLearner
from .feature_trainer import FeatureTrainer
from .keys import MethodConfig, kept_views, key


@dataclass(frozen=True)
class AnchoredConfig(MethodConfig):
    """Settings of a matrix that is held near its start."""

    views: int = kept_views(300, source="300")
    lambda_: float = key(1.0, "weight of the penalty for S = 1; it is LAMBDA / S^POWER", low=0, source="1")
    power: float = key(
        1.0,
        "how fast the penalty falls with S, the mean number of training images per class: 1 (1/S), 2 (1/S^2), or 0 "
        "(LAMBDA itself)",
        low=0,
        source="1 and 2",
    )
    half: bool = key(
        False,
        "learn in float16, with the optimizer's averages in float16, too, as the source does; needs PREC fp32 or bf16, "
        "and on a CPU torch 2.6",
        source="True",
    )

    def check(self, path: str) -> None:
        """Check that gradients can be computed in half precision; see MethodConfig."""
        if self.half and self.prec not in ("fp32", "bf16"):
            raise ValueError(
                f"Expected {path}.PREC to be fp32 or bf16 where .HALF is True, as gradients in float16 cannot be "
                f"scaled, but got {self.prec!r}"
            )


class AnchoredLearner(FeatureLearner):
    """The matrix M.

    Args:
        start: M_0, [P, E].
        bias: b, [E], which is not learnt; None: zero.
        half: whether M is kept, and all that it takes part in is computed, in float16.
    """

    start: Tensor
    bias: Tensor | None

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        zeroshot: Tensor,
        *,
        start: Tensor,
        bias: Tensor | None = None,
        half: bool = False,
    ) -> None:
        super().__init__(clip, classnames, zeroshot)
        start = start.detach().float()
        self.register_buffer("start", start.clone(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone(), persistent=False)
        self.matrix = nn.Parameter(start.to(torch.float16 if half else torch.float32, copy=True))

    def through(self, features: Tensor, matrix: Tensor) -> Tensor:
        """Return normalized features [B, E] for features [B, P] that go through a matrix [P, E], in its precision."""
        bias = None if self.bias is None else self.bias.to(matrix.dtype)
        return F.normalize(F.linear(features.to(matrix.dtype), matrix.t(), bias), dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, P]."""
        images = self.through(features, self.matrix)
        return (self.scale * images @ self.zeroshot.to(images.dtype).t()).float()

    def distance(self) -> Tensor:
        """Return |M - M_0|^2, [], in the precision of M."""
        return F.mse_loss(self.matrix, self.start.to(self.matrix.dtype), reduction="sum")


class AnchoredTrainer(FeatureTrainer):
    """Train an `AnchoredLearner`, which a subclass builds; all training images make a step, each in another view."""

    network: Any
    config: type[MethodConfig] = AnchoredConfig
    imagenet_templates = IMAGENET_TEMPLATES_SELECT
    drop_last = False
    eps = 1e-4

    def penalty_weight(self) -> float:
        """Return lambda, where S is the mean number of training images per class."""
        settings, dataset = self.settings, self.dm.dataset
        return float(settings.lambda_ / (len(dataset.train_x) / len(dataset.classnames)) ** settings.power)

    def loss(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the cross-entropy and the penalty, computed in the precision of the matrix."""
        learner = self.network.learner
        cross_entropy = self.class_loss(outputs.to(learner.matrix.dtype), labels)
        return {"ce": cross_entropy.float(), "penalty": (self.penalty_weight() * learner.distance()).float()}

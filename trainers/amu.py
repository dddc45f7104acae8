"""AMU-Tuning: a linear classifier of auxiliary features beside zero-shot CLIP, that counts most where CLIP is unsure.

Tang et al., AMU-Tuning: Effective Logit Bias for CLIP-based Few-shot Learning, 2024.

    logits = s f T^T + alpha u z        z = Z(a V^T)        u = (kurtosis(softmax(s f T^T)) / k)^-POWER
    loss = LAMBDA cross-entropy(logits) + (1 - LAMBDA) cross-entropy(z)

T are the zero-shot weights. a are auxiliary features, of unit length: those before CLIP's last projection, corrected
ones (MODEL.IMO_WEIGHTS), or those of a model of torchvision (AUX); the source has MoCo v3's. V starts as the class
means of a. Z subtracts the mean over the classes of an image and divides by the standard deviation. The kurtosis is the
mean fourth power of a standardized row; it is large where CLIP is sure. The source's k is 250, for 1,000 classes. Here
k is a quarter of the kurtosis of a one-hot row, which is 249 there and suits other numbers of classes.

Legend: B images, N training images, C classes, E width of the joint embedding, A width of the auxiliary features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import CorrectedKeys, FeatureLearner, FeatureTrainer, MethodConfig, PooledLearner, kept_views, key
from .clip import CLIP, IMAGENET_TEMPLATES_SELECT
from .features import FeatureSet, ImageEncoder
from .features.auxiliary import AuxiliaryEncoder, check_auxiliary
from .modules.gaussian import class_sums
from .modules.standardized import standardized

SHARE = 0.25  # of the kurtosis of a one-hot row, where u is 1


def kurtosis(rows: Tensor) -> Tensor:
    """Return the mean fourth power of each standardized row, [B, 1], for rows [B, C].

    The standard deviation is that of a sample, so that no row has less than ((C - 1) / C)^2. A constant row, which has
    no kurtosis, counts as having this least one. A one-hot row has ((C - 1) / C)^2 (C - 2 + 1 / (C - 1)).
    """
    classes = rows.shape[1]
    return standardized(rows).pow(4).mean(dim=1, keepdim=True).clamp(min=((classes - 1) / classes) ** 2)


@functools.cache  # asked for in each step
def kurtosis_of_one_hot(classes: int, dtype: torch.dtype) -> float:
    """Return the kurtosis of a one-hot row of C classes as `kurtosis` computes it in that precision."""
    return float(kurtosis(F.one_hot(torch.zeros(1, dtype=torch.long), classes).to(dtype)))


def uncertainty(clip_logits: Tensor, power: float, reference: float = 0.0) -> Tensor:
    """Return u [B, 1] for zero-shot logits [B, C]; of one class, which is sure, 1.

    Args:
        reference: k; 0: a quarter of the kurtosis of a one-hot row.
    """
    classes = clip_logits.shape[1]
    if not power or classes == 1:
        return torch.ones_like(clip_logits[:, :1])
    k = reference or SHARE * kurtosis_of_one_hot(classes, clip_logits.dtype)
    return (kurtosis(clip_logits.softmax(dim=1)) / k) ** -power


class AMULearner(PooledLearner):
    """The classifier V of auxiliary features.

    Args:
        width: A.
        auxiliary: where the auxiliary features come from, for a checkpoint; "": features are those before CLIP's last
            projection, [B, A], else CLIP's own and the auxiliary ones, [B, E + A].
        alpha, power, reference: see the formula.
    """

    CLASS_ROWS = ("weight",)

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        zeroshot: Tensor,
        *,
        width: int,
        auxiliary: str,
        alpha: float,
        power: float,
        reference: float = 0.0,
    ) -> None:
        super().__init__(clip, classnames, zeroshot, pooled=not auxiliary)
        self.facts["auxiliary"] = auxiliary
        self.alpha, self.power, self.reference = alpha, power, reference
        self.weight = nn.Parameter(torch.zeros(len(classnames), width))

    def original(self, features: Tensor) -> Tensor:
        """Return CLIP's features [..., E], normalized."""
        if self.pooled:
            return super().original(features)
        return F.normalize(features[..., : self.zeroshot.shape[1]], dim=-1)

    def auxiliary(self, features: Tensor) -> Tensor:
        """Return a, [..., A], normalized."""
        return F.normalize(features if self.pooled else features[..., self.zeroshot.shape[1] :], dim=-1)

    @torch.no_grad()
    def fill(self, features: Tensor, labels: Tensor) -> None:
        """Let V be the class means of the auxiliary features of N images, whose features and labels [N] these are.

        A class without an image has zeros.
        """
        sums = class_sums(self.auxiliary(features).double(), labels, len(self.weight))
        counts = labels.bincount(minlength=len(self.weight)).clamp(min=1)
        self.weight.copy_(sums / counts[:, None])

    def parts(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and z, [B, C] each, for features [B, A] or [B, E + A]."""
        clip_logits = self.clip_logits(features)
        z = standardized(self.auxiliary(features) @ self.weight.t())
        return clip_logits + self.alpha * uncertainty(clip_logits, self.power, self.reference) * z, z

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, A] or [B, E + A]."""
        return self.parts(features)[0]


@dataclass(frozen=True)
class AMUTuningConfig(MethodConfig):
    """Settings of AMU-Tuning."""

    views: int = kept_views(10, source="fresh ones")
    alpha: float = key(0.5, "weight of the classifier", low=0, source="0.5")
    lambda_: float = key(0.35, "share of the sum's cross-entropy; the classifier's own has the rest", low=0, high=1,
                         source="0.35")  # fmt: skip
    power: float = key(
        0.4,
        "how fast u falls with the kurtosis of CLIP's probabilities; 0: u is 1",
        low=0,
        source="0.4 in the paper; its code has u = 1 unless told otherwise",
    )
    reference: float = key(
        0.0,
        "k, the kurtosis at which u is 1; 0: a quarter of that of a one-hot row",
        low=0,
        source="250",
    )
    aux: str = key(
        "",
        "name of the torchvision model that gives the auxiliary features; '': those before CLIP's last projection, or "
        "corrected ones where MODEL.IMO_WEIGHTS is set",
        source="resnet50, trained by MoCo v3",
    )
    aux_weights: str = key("", "file with the weights of AUX")

    def check(self, path: str) -> None:
        """Check that AUX and AUX_WEIGHTS are given together; see MethodConfig."""
        if bool(self.aux) != bool(self.aux_weights):
            raise ValueError(
                f"Expected {path}.AUX and .AUX_WEIGHTS to be given together but got {self.aux!r} and "
                f"{self.aux_weights!r}"
            )


@TRAINER_REGISTRY.register()
class AMUTuning(FeatureTrainer):
    """A linear classifier of auxiliary features, weighed by CLIP's uncertainty."""

    paper = "Tang et al. 2024"
    learns = "a linear classifier of auxiliary features"
    config = AMUTuningConfig
    extra_keys = {"MODEL": CorrectedKeys}
    imagenet_templates = IMAGENET_TEMPLATES_SELECT
    of_each_class = "weights"
    adapters = "optional"
    projected = False
    drop_last = False
    eps = 1e-4
    network: Any
    _encoder: ImageEncoder | None = None

    @classmethod
    def check_settings(cls, cfg: Any) -> None:
        """Check the settings, and that there are auxiliary features; see CLIPTrainer."""
        super().check_settings(cfg)
        settings = cls.read_settings(cfg)
        if settings.aux and cfg.MODEL.get("IMO_WEIGHTS", ""):
            raise ValueError(
                f"Expected TRAINER.{cls.node_name}.AUX or MODEL.IMO_WEIGHTS to be '' but got {settings.aux!r} and "
                f"{cfg.MODEL.IMO_WEIGHTS!r}"
            )
        if settings.aux:
            check_auxiliary(settings.aux, settings.aux_weights)

    @classmethod
    def needs_blocks(cls, cfg: Any) -> str:
        """Return what the method does within the image encoder: nothing, where another model is beside CLIP."""
        return "" if cls.read_settings(cfg).aux else super().needs_blocks(cfg)

    def build_encoder(self, clip: CLIP) -> ImageEncoder:
        """Build the encoder, once: features before CLIP's projection, or CLIP's own and auxiliary ones beside them."""
        if self._encoder is None:
            self._encoder = self._new_encoder(clip)
        return self._encoder

    def _new_encoder(self, clip: CLIP) -> ImageEncoder:
        settings, pixels = self.settings, self.cfg.INPUT
        if settings.aux:
            plain = "normalize" not in pixels.TRANSFORMS
            mean, std = ((0.0,) * 3, (1.0,) * 3) if plain else (pixels.PIXEL_MEAN, pixels.PIXEL_STD)
            return AuxiliaryEncoder(clip, settings.prec, self._autocast, settings.aux, settings.aux_weights, mean, std)
        encoder = super().build_encoder(clip)
        return encoder.raw() if encoder.parts > 1 else encoder

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the classifier, which is zero until `prepare`."""
        encoder, settings = self.build_encoder(clip), self.settings
        auxiliary = encoder.weights_digest.removeprefix(clip.weights_digest).removeprefix("+")
        width = encoder.width - clip.embed_dim if auxiliary else encoder.width
        return AMULearner(
            clip,
            classnames,
            zeroshot,
            width=width,
            auxiliary=auxiliary,
            alpha=settings.alpha,
            power=settings.power,
            reference=settings.reference,
        )

    def prepare(self, features: FeatureSet) -> None:
        """Let the classifier start as the class means of the training images, each the mean of its views."""
        self.network.learner.fill(features.mean(), features.labels)

    def run(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and the classifier's own, [B, C] each."""
        return self.network.learner.parts(inputs)

    def loss(self, outputs: tuple[Tensor, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return the cross-entropy of the sum and that of the classifier alone, with their weights."""
        logits, z = outputs
        share = self.settings.lambda_
        return {
            "loss_sum": share * self.class_loss(logits, labels),
            "loss_aux": (1 - share) * self.class_loss(z, labels),
        }

    def shown_logits(self, outputs: tuple[Tensor, Tensor]) -> Tensor:
        """Return the logits [B, C]."""
        return outputs[0]

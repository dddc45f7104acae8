"""Encode images with a frozen CLIP, and hold the features of a split.

Legend: V views, N images, B images in a batch, E width of the joint embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..clip.model import CLIP

Batch = dict[str, Any]
Encode = Callable[[Tensor], Tensor]


class ImageEncoder:
    """Encode images by a frozen CLIP: all trainers use this one encoder, so that they can share features.

    Args:
        clip: the frozen CLIP.
        precision: fp32, fp16, amp or bf16; it must be that of `autocast` and of CLIP's weights.
        autocast: gives the context in which images are encoded.

    Attributes:
        parts: how many kinds of features lie side by side in the result.
        unit: whether the features of each kind are L2-normalized.
        projected: whether features are CLIP's, in the space of the texts; else those before CLIP's last projection.
    """

    parts = 1
    unit = True
    projected = True

    def __init__(self, clip: CLIP, precision: str, autocast: Callable[[], Any]) -> None:
        self.clip = clip
        self.precision = precision
        self.autocast = autocast

    @property
    def width(self) -> int:
        """Width of the features that are returned."""
        return self.parts * (self.clip.embed_dim if self.projected else self.clip.visual.pooled_dim)

    @property
    def weights_digest(self) -> str:
        """SHA-256 (hex) of all weights that features depend on."""
        return self.clip.weights_digest

    @property
    def form(self) -> str:
        """Facts that decide features beside weights and our own code, as a text; "": there are none."""
        return self.clip.visual.form

    def raw(self) -> ImageEncoder:
        """Return a copy of the encoder whose features keep their lengths."""
        other = copy.copy(self)
        other.unit = False
        return other

    def before_projection(self) -> ImageEncoder:
        """Return a copy of the encoder whose features are those before CLIP's last projection, with their lengths.

        Raises:
            ValueError: the encoder gives features of several kinds.
        """
        if self.parts > 1:
            raise ValueError(f"Expected an encoder of one kind of features but got one of {self.parts}")
        other = self.raw()
        other.projected = False
        return other

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features [B, width] of images [B, 3, H, W], fp32, on CLIP's device, L2-normalized if `unit`."""
        encode = self.clip.encode_image if self.projected else self.clip.pool_image
        with self.autocast():
            features = encode(images.to(self.clip.device))
        return F.normalize(features.float(), dim=-1) if self.unit else features.float()


@dataclass(frozen=True)
class FeatureSet:
    """Features of the images of one split, in the order of the split.

    Attributes:
        values: features [V, N, E], normalized, fp32, on CLIP's device.
        labels: [N], on CLIP's device.
        paths: files of the N images; empty where the loader does not give them.
        lengths: [V, N, P], the lengths of the P parts of E before they were normalized; None: not known.
    """

    values: Tensor
    labels: Tensor
    paths: Sequence[str]
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def flat(self) -> tuple[Tensor, Tensor]:
        """Return features [V * N, E] and labels [V * N], every view as an image of its own."""
        return self.values.flatten(0, 1), self.labels.repeat(len(self.values))

    def normalized(self, parts: int) -> FeatureSet:
        """Return a feature set with each of the `parts` of E normalized, which records their lengths before."""
        split = self.values.unflatten(-1, (parts, -1))
        return FeatureSet(F.normalize(split, dim=-1).flatten(-2), self.labels, self.paths, split.norm(dim=-1))

    def mean(self) -> Tensor:
        """Return the mean [N, E], over the views, of the features as they were before normalization.

        Where their lengths are not known, it is the mean of the features as they are.
        """
        if self.lengths is None:
            return self.values.mean(dim=0)
        split = self.values.unflatten(-1, (self.lengths.shape[-1], -1))
        return (split * self.lengths[..., None]).mean(dim=0).flatten(-2)


class Slot(Protocol):
    """A place where features are kept between runs."""

    def load(self) -> FeatureSet | None:
        """Return the features, or None where they are not there."""

    def save(self, values: Tensor) -> None:
        """Keep features [V, N, E]."""

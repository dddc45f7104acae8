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
    """Images -> features of a frozen CLIP: one encoder for all trainers, so that they can share features.

    Args:
        clip: the frozen CLIP.
        precision: fp32, fp16, amp or bf16, as `autocast` and the CLIP's weights have it.
        autocast: gives the context in which images are encoded.

    Attributes:
        parts: kinds of features that lie side by side in what is returned.
        unit: whether each of them is L2-normalised.
    """

    parts = 1
    unit = True

    def __init__(self, clip: CLIP, precision: str, autocast: Callable[[], Any]) -> None:
        self.clip = clip
        self.precision = precision
        self.autocast = autocast

    @property
    def width(self) -> int:
        """Width of what is returned."""
        return self.parts * self.clip.embed_dim

    @property
    def weights_digest(self) -> str:
        """SHA-256 (hex) of all weights that features depend on."""
        return self.clip.weights_digest

    def raw(self) -> ImageEncoder:
        """Return the same encoder, whose features keep their lengths."""
        other = copy.copy(self)
        other.unit = False
        return other

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> features [B, E], L2-normalised if `unit`, fp32, on CLIP's device."""
        with self.autocast():
            features = self.clip.encode_image(images.to(self.clip.device))
        return F.normalize(features.float(), dim=-1) if self.unit else features.float()


@dataclass(frozen=True)
class FeatureSet:
    """Features of the images of one split, in the order of the split.

    Attributes:
        values: [V, N, E], normalised, fp32, on CLIP's device.
        labels: [N], there too.
        paths: the N images' files; empty where the loader does not say.
        lengths: [V, N, P] of the P parts that lie side by side in E, before they were normalised; None: not known.
    """

    values: Tensor
    labels: Tensor
    paths: Sequence[str]
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def flat(self) -> tuple[Tensor, Tensor]:
        """Every view an image of its own: features [V * N, E] and labels [V * N]."""
        return self.values.flatten(0, 1), self.labels.repeat(len(self.values))

    def normalised(self, parts: int) -> FeatureSet:
        """Return the same with each of the parts of E normalised, and their lengths."""
        split = self.values.unflatten(-1, (parts, -1))
        return FeatureSet(F.normalize(split, dim=-1).flatten(-2), self.labels, self.paths, split.norm(dim=-1))

    def mean(self) -> Tensor:
        """Return the mean over the views [N, E] of the features as they were before they were normalised."""
        if self.lengths is None:
            return self.values.mean(dim=0)
        split = self.values.unflatten(-1, (self.lengths.shape[-1], -1))
        return (split * self.lengths[..., None]).mean(dim=0).flatten(-2)


class Slot(Protocol):
    """Where features are kept between runs."""

    def load(self) -> FeatureSet | None:
        """The features, or None where they are not there."""

    def save(self, values: Tensor) -> None:
        """Keep features [V, N, E]."""

"""CLIP as every trainer sees it: two frozen towers, a temperature, and where the weights came from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

from .text import TextTower
from .vision import VisionTower, build_vision_tower

PRECISIONS = ("fp32", "fp16", "amp", "bf16")


class CLIP(nn.Module):
    """A frozen CLIP, always in eval mode.

    Attributes:
        visual: image tower. text: text tower.
        name: backbone name as configured.
        embed_dim: E. image_size: input side length in pixels.
        has_blocks: whether methods can run the towers' blocks; else images and texts give features, and no more.
        logit_scale: exp of CLIP's learned log-temperature (about 100 for OpenAI's weights).
        logit_bias: what a sigmoid's logits get added (SigLIP); 0: nothing. It is the same for all classes, so that it
            changes neither softmax nor argmax over a list of classes, and no method adds it.
        pixel_mean, pixel_std: input normalization the weights were trained with, per RGB channel, for pixels in 0..1.
        known_ids: token ids that the weights have an embedding for; None: all of the vocabulary.
        weights_digest: sha256 (hex) of the weights' fp32 values: the same for every file format and precision.
    """

    def __init__(
        self,
        model: Any,
        name: str = "custom",
        precision: str = "fp32",
        pixel_mean: Sequence[float] = OPENAI_DATASET_MEAN,
        pixel_std: Sequence[float] = OPENAI_DATASET_STD,
        towers: tuple[VisionTower, TextTower] | None = None,
    ) -> None:
        """Wrap (and take over) an open_clip CLIP.

        Args:
            model: an ``open_clip.CLIP`` with fp32 weights, or what ``towers`` are of.
            precision: "fp32" and "amp" keep fp32 weights (amp: the engine autocasts); "fp16" and "bf16" cast the
                weights except embeddings and normalization layers, which stay fp32.
            towers: image and text tower of a model that is taken as a whole (see opaque.py), which bring their
                precision with them; None: the model's own blocks.
        """
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"Expected precision to be one of {', '.join(PRECISIONS)} but got {precision!r}")
        self.has_blocks = towers is None
        self.visual, self.text = towers or (build_vision_tower(model.visual), TextTower(model))
        self.name = name
        self.embed_dim = self.text.embed_dim
        self.image_size = self.visual.image_size
        self.logit_scale = float(model.logit_scale.detach().float().exp())
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = 0.0 if bias is None else float(bias.detach().float())
        self.pixel_mean = tuple(float(x) for x in pixel_mean)
        self.pixel_std = tuple(float(x) for x in pixel_std)
        self.known_ids: frozenset[int] | None = None
        self._digest: str | None = None
        if precision in ("fp16", "bf16") and self.has_blocks:
            self._digest = self._compute_digest()  # before the values are rounded
            open_clip.convert_weights_to_lp(model, torch.float16 if precision == "fp16" else torch.bfloat16)
        self.requires_grad_(False)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the towers."""
        return self.text.dtype

    @property
    def device(self) -> torch.device:
        """Return the device that the weights are on."""
        return next(self.parameters()).device

    @property
    def weights_digest(self) -> str:
        if self._digest is None:
            self._digest = self._compute_digest()
        return self._digest

    def _compute_digest(self) -> str:
        digest = hashlib.sha256(repr(self.logit_scale).encode())
        for key, value in sorted(self.state_dict().items()):
            if not key.endswith("num_batches_tracked"):  # a training counter that some formats leave out
                digest.update(f"{key}{tuple(value.shape)}".encode())
                digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def train(self, mode: bool = True) -> CLIP:
        """Keep eval mode, whatever ``mode`` the module around this one asks for.

        A frozen backbone's batch statistics never move.
        """
        return super().train(False)

    def encode_image(self, images: Tensor) -> Tensor:
        """Return image features [B, E], not L2-normalized, for normalized images [B, 3, S, S]."""
        return self.visual(images)

    def pool_image(self, images: Tensor) -> Tensor:
        """Return image features before the last projection, [B, P], for normalized images [B, 3, S, S]."""
        return self.visual.pooled(images)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Return text features [N, E], not L2-normalized, for N prompts."""
        return self.text(prompts)

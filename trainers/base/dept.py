"""DePT, an option of prompt methods: a linear classifier beside the prompts, on features that are scaled and shifted.

Zhang et al., DePT: Decoupled Prompt Tuning, 2024. Of image features f and text features t, as CLIP's encoders give them
(not of length 1), each channel is scaled and shifted; one linear classifier of the training classes takes both:

    f' = scale_f * f + shift_f        t' = scale_t * t + shift_t
    loss   = (1 - WEIGHT) CE(prompts) + WEIGHT CE(linear([f', t' of the image's class]))
    logits = (1 - WEIGHT) prompts     + WEIGHT linear(f')            for classes that were trained on, else the prompts'

Legend: B images, C classes, E width of the joint embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .keys import key
from .learner import class_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DePTKeys:
    """Settings of DePT in the node of a prompt method."""

    weight: float = key(
        0.0,
        "DePT: share, in loss and logits, of a linear classifier of scaled and shifted features; 0: without it",
        low=0,
        high=1,
        source="0.7 with DePT",
    )
    lr_factor: float = key(6.5, "DePT: the classifier's learning rate is OPTIM.LR times this", above=0, source="6.5")


class ChannelShift(nn.Module):
    """A scale and a shift of each channel; the names in its state are the published ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., E], scaled and shifted."""
        return self.scale * x + self.bias


class DePTHead(nn.Module):
    """The linear classifier and what is done to features before it, fp32; names as published.

    Args:
        width: E.
        num_classes: C.

    Attributes:
        applies: whether the present classes were trained on, so that the classifier takes part in their logits.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.film_lp_img, self.film_lp_text = ChannelShift(width), ChannelShift(width)
        self.linear_probe_proj = nn.Linear(width, num_classes)
        self.applies = True

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for image features [B, E]."""
        with torch.autocast(device_type=features.device.type, enabled=False):
            return self.linear_probe_proj(self.film_lp_img(features.float()))

    def trained_on(self, features: Tensor, texts: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the classifier is trained on: logits [2 B, C] of texts, then of images, and their labels [2 B].

        Args:
            features: of the images, [B, E].
            texts: of all classes, [C, E].
            labels: [B].
        """
        with torch.autocast(device_type=features.device.type, enabled=False):
            shifted = torch.cat([self.film_lp_text(texts.float())[labels], self.film_lp_img(features.float())])
            return self.linear_probe_proj(shifted), torch.cat([labels, labels])

    def for_classes(
        self,
        state: Mapping[str, Tensor],
        prefix: str,
        names: Sequence[str],
        trained: Sequence[str] | None,
        indices: Sequence[int] | None,
    ) -> dict[str, Tensor]:
        """Return the entries of a checkpoint's state that are the classifier's, for the present classes.

        Where not all of them were trained on, these are the present values, and the classifier takes no part.

        Args:
            state: of the learner that has this head.
            prefix: name of the head in there, with a dot.
            names: the present classes.
            trained: the classes trained on; None: not known, the present ones.
            indices: see `class_rows`.
        """
        own = {f"{prefix}linear_probe_proj.{name}": p for name, p in self.linear_probe_proj.named_parameters()}
        if trained is None:
            return {name: state[name] for name in own}
        try:
            rows = class_rows(names, trained, indices)
        except ValueError:
            self.applies = False
            logger.info("Not all of the %d classes were trained on: DePT's classifier takes no part", len(names))
            return {name: p.detach() for name, p in own.items()}
        self.applies = True
        return {name: state[name][rows] for name in own}

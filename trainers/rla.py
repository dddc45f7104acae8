"""RLA: a linear map of CLIP's image features, held near the identity.

Fahes et al., CLIP's Visual Embedding Projector is a Few-shot Cornucopia, 2024, call it the regularized linear adapter.
No validation set is used.

    logits = s normalize(f A) T^T,  A = I at first
    loss = CE(logits) + lambda |A - I|^2,  lambda = 1 / S

T are the zero-shot weights. The length of f does not matter, so that f are the normalized features of other methods.

Legend: C classes, E width of the joint embedding, S training images per class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dassl.engine import TRAINER_REGISTRY

from .base import AnchoredLearner, AnchoredTrainer, FeatureLearner
from .clip import CLIP


@TRAINER_REGISTRY.register()
class RLA(AnchoredTrainer):
    """The regularized linear adapter."""

    paper = "Fahes et al. 2024"
    learns = "a linear map of image features, held near the identity"

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the map, which starts as the identity."""
        start = torch.eye(zeroshot.shape[1], device=zeroshot.device)
        return AnchoredLearner(clip, classnames, zeroshot, start=start, half=self.settings.half)

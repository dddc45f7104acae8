"""ProLIP: CLIP's own last matrix of the image encoder, trained and held near where it starts.

Fahes et al., CLIP's Visual Embedding Projector is a Few-shot Cornucopia, 2024; this is the variant without a validation
set.

    logits = s normalize(x W + b) T^T,  W = W_0 at first
    loss = CE(logits) + lambda |W - W_0|^2,  lambda = 1 / S (or 1 / S^2)

x are the features that W_0 projects to the joint embedding: after the last LayerNorm of a ViT, within the attention
pool of a ResNet. W_0 is the ViT's projection, or the pool's output matrix. Only the latter has a b, which stays. T are
the zero-shot weights.

Legend: B images, C classes, P width of x, E width of the joint embedding, S training images per class.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dassl.engine import TRAINER_REGISTRY

from .base import AnchoredLearner, AnchoredTrainer, FeatureLearner
from .clip import CLIP


class ProLIPLearner(AnchoredLearner):
    """The projection W. Features are those before CLIP's projection."""

    def original(self, features: Tensor) -> Tensor:
        """Return CLIP's features [B, E], normalized, from those before its projection, [B, P]."""
        return self.through(features, self.start)


@TRAINER_REGISTRY.register()
class ProLIP(AnchoredTrainer):
    """The projection of the image encoder, trained near its start."""

    paper = "Fahes et al. 2024"
    learns = "the last matrix of the image encoder, held near CLIP's"
    projected = False

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the projection, which starts as CLIP's."""
        start, bias = clip.visual.projection()
        return ProLIPLearner(clip, classnames, zeroshot, start=start, bias=bias, half=self.settings.half)

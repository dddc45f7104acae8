"""MMRL: tokens of a space of their own, mapped into the later layers of both encoders, give a second image feature.

Guo and Gu, MMRL: Multi-Modal Representation Learning for Vision-Language Models, 2025. Each layer has its own linear
map into each encoder; the projection of the second feature is a matrix of its own, which starts at random. Formulas,
and what it shares with MMRL++, are in base/representations.py.

Legend: D width of the image encoder, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dassl.engine import TRAINER_REGISTRY

from .base.representations import (
    RepresentationConfig,
    RepresentationLearner,
    RepresentationTrainer,
)
from .clip import CLIP
from .modules.representations import MappedRepresentations


class OwnProjection(nn.Module):
    """The projection of the second image feature, `proj_rep` [D, E], which starts at random."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.proj_rep = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))


class MMRLLearner(RepresentationLearner):
    """The tokens, their maps and the projection. Names: `representation_learner.*`, `image_encoder.proj_rep`.

    Args:
        clip, classnames, settings: see RepresentationLearner.
    """

    def __init__(self, clip: CLIP, classnames: Sequence[str], settings: RepresentationConfig) -> None:
        super().__init__(clip, classnames, settings, "MMRL")
        width, layers = clip.visual.widths[1], len(self.blocks)
        self.representation_learner = MappedRepresentations(
            settings.n_rep_tokens, settings.rep_dim, width, clip.text.width, layers
        )
        self.image_encoder = OwnProjection(width, clip.embed_dim)

    def projection(self, own: Tensor) -> Tensor:
        """Return the learnt projection of the second image feature; see RepresentationLearner."""
        return self.image_encoder.proj_rep


@TRAINER_REGISTRY.register()
class MMRL(RepresentationTrainer):
    """Multi-modal representation learning."""

    paper = "Guo and Gu 2025"
    learns = "tokens in the later layers of both encoders, and a projection of theirs"
    config = RepresentationConfig
    main_head = "mmrl"
    learner_class = MMRLLearner

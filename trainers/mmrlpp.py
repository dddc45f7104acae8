"""MMRL++: MMRL with maps that share a matrix, tokens that keep a part of what they were, a projection near CLIP's.

Guo and Gu, MMRL++: Parameter-Efficient and Interaction-Aware Representation Learning for Vision-Language Models, 2025.
Layer j maps tokens into an encoder by W + A_j B_j, with one W for all layers. In front of a block, tokens x of the one
before are replaced by BETA new + (1 - BETA) x. The second image feature goes through CLIP's projection plus A B.
Formulas, and what it shares with MMRL, are in base/representations.py.

Legend: D width of the image encoder, E width of the joint embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dassl.engine import TRAINER_REGISTRY

from .base import key
from .base.representations import (
    RepresentationConfig,
    RepresentationLearner,
    RepresentationTrainer,
)
from .clip import CLIP
from .modules.representations import SharedRepresentations


@dataclass(frozen=True)
class MMRLPPConfig(RepresentationConfig):
    """Settings of MMRL++."""

    beta: float = key(
        0.9, "share of new tokens where they replace others", low=0, high=1, source="0.1 to 0.9, by dataset"
    )
    proj_lora_dim: int = key(64, "rank of what is added to CLIP's projection", low=1)
    res_lora_dim: int = key(4, "rank of what a layer adds to the shared map", low=1)


class ProjectionUpdate(nn.Module):
    """The update of CLIP's projection, `A` `B`, [D, E]; it is zero at the start."""

    def __init__(self, width: int, embed_dim: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(width, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.B = nn.Parameter(torch.zeros(rank, embed_dim))


class MMRLPPLearner(RepresentationLearner):
    """The tokens, their maps and what is added to the projection. Names: `representation_learner.*`, `image_encoder.*`.

    Args:
        clip, classnames: see RepresentationLearner.
        settings: see MMRLPPConfig.
    """

    def __init__(self, clip: CLIP, classnames: Sequence[str], settings: MMRLPPConfig) -> None:
        super().__init__(clip, classnames, settings, "MMRLPP")
        self.share = self.facts["beta"] = settings.beta
        width, layers = clip.visual.widths[1], len(self.blocks)
        self.representation_learner = SharedRepresentations(
            settings.n_rep_tokens, settings.rep_dim, width, clip.text.width, layers, settings.res_lora_dim
        )
        self.image_encoder = ProjectionUpdate(width, clip.embed_dim, settings.proj_lora_dim)

    def projection(self, own: Tensor) -> Tensor:
        """Return CLIP's projection with a low-rank change; see RepresentationLearner."""
        return own + self.image_encoder.A @ self.image_encoder.B


@TRAINER_REGISTRY.register()
class MMRLPP(RepresentationTrainer):
    """Parameter-efficient multi-modal representation learning (MMRL++)."""

    paper = "Guo and Gu 2025b"
    learns = "tokens in the later layers of both encoders, with shared maps"
    config = MMRLPPConfig
    main_head = "mmrlpp"
    learner_class = MMRLPPLearner

"""Tip-Adapter: a cache of the training images' features beside zero-shot CLIP; Tip-Adapter-F trains its keys.

Zhang et al., Tip-Adapter: Training-Free Adaption of CLIP for Few-Shot Classification, 2022.

    logits = s f W^T + alpha exp(-beta (1 - f K^T)) V

K are the mean features of the training images over their views, V their one-hot labels. alpha and beta are searched on
validation images, here and in the source; the source also picks the epoch of the trained variant on test images, which
is not done here.

Legend: B images, N keys, C classes, E width of the joint embedding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .clip import CLIP, IMAGENET_TEMPLATES_SELECT
from .clip.features import FeatureSet
from .common import check_number
from .frozen import FeatureLearner, FeatureTrainer

logger = logging.getLogger(__name__)


def cache_logits(affinity: Tensor, key_labels: Tensor, num_classes: int, beta: float) -> Tensor:
    """exp(-beta (1 - affinity)) V, with V given as labels.

    Args:
        affinity: [B, N], cosine similarities of images and keys.
        key_labels: [N].
    """
    weights = torch.exp(-beta * (1 - affinity))
    return weights.new_zeros(len(weights), num_classes).index_add(1, key_labels, weights)


def tip_logits(
    features: Tensor, clip_logits: Tensor, keys: Tensor, key_labels: Tensor, alpha: float, beta: float
) -> Tensor:
    """Zero-shot logits plus those of the cache.

    Args:
        features: [B, E]. clip_logits: [B, C]. keys: [N, E]. key_labels: [N].
    """
    return clip_logits + alpha * cache_logits(features @ keys.t(), key_labels, clip_logits.shape[1], beta)


def search_grid(scale: float, steps: int) -> list[float]:
    """`steps` values from 0.1 up to, but without, `scale`, evenly spaced: the source's grid."""
    return [0.1 + i * (scale - 0.1) / steps for i in range(steps)]


class TipChoice(NamedTuple):
    """A pair from the grid, and its accuracy (percent) on the images it was chosen on."""

    alpha: float
    beta: float
    accuracy: float


def search_tip(
    clip_logits: Tensor,
    affinity: Tensor,
    key_labels: Tensor,
    labels: Tensor,
    alphas: Sequence[float],
    betas: Sequence[float],
) -> TipChoice:
    """The pair with the most images right; of equals the first, beta before alpha.

    Args:
        clip_logits: [n, C]. affinity: [n, N]. key_labels: [N]. labels: [n].
    """
    best = TipChoice(alphas[0], betas[0], -1.0)
    for beta in betas:
        cache = cache_logits(affinity, key_labels, clip_logits.shape[1], beta)
        for alpha in alphas:
            correct = ((clip_logits + alpha * cache).argmax(dim=1) == labels).double().mean()
            if 100.0 * float(correct) > best.accuracy:
                best = TipChoice(alpha, beta, 100.0 * float(correct))
    return best


class TipLearner(FeatureLearner):
    """The cache.

    Args:
        n: N.
        alpha, beta: until others are chosen.
        trained: whether the keys are trained.
    """

    SAMPLES: tuple[str, ...] = ("key_labels", "keys")

    keys: Tensor
    key_labels: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        zeroshot: Tensor,
        *,
        n: int,
        alpha: float,
        beta: float,
        trained: bool,
    ) -> None:
        super().__init__(clip, classnames, zeroshot)
        keys = torch.zeros(n, zeroshot.shape[1])
        if trained:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)
        self.register_buffer("key_labels", torch.zeros(n, dtype=torch.long))
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float64))
        self.register_buffer("beta", torch.tensor(beta, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, E] -> logits [B, C]."""
        clip_logits, images = self.clip_logits(features), self.compared(features)
        return tip_logits(images, clip_logits, self.keys, self.key_labels, float(self.alpha), float(self.beta))


def add_tip_config(cfg: Any, name: str) -> None:
    if name in cfg.TRAINER:
        return
    node = FeatureTrainer.new_node(cfg, views=10)
    node.ALPHA = 1.0  # weight of the cache where it is not searched, above 0 (source: 1 on ImageNet)
    node.BETA = 5.5  # its sharpness where it is not searched, above 0 (source: 5.5 on ImageNet)
    # Upper ends of the grid of (beta, alpha), which starts at 0.1, and its numbers of values (source: 7, 3; 200, 20).
    node.SEARCH_SCALE = (7.0, 3.0)
    node.SEARCH_STEP = (200, 20)
    cfg.TRAINER[name] = node


@TRAINER_REGISTRY.register()
class TipAdapter(FeatureTrainer):
    """The training-free cache."""

    node_name = "TIPADAPTER"
    model_name = "tip"
    main_head = "tip"
    imagenet_templates = IMAGENET_TEMPLATES_SELECT
    of_each_class = "images in the cache"
    eps = 1e-4
    trained = False

    @staticmethod
    def add_config(cfg: Any) -> None:
        """Adds TRAINER.TIPADAPTER to `cfg` unless it is there."""
        add_tip_config(cfg, "TIPADAPTER")

    def check_node(self, cfg: Any) -> None:
        """See LearnerTrainer."""
        path = f"TRAINER.{self.node_name}"
        for key in ("ALPHA", "BETA"):
            check_number(cfg, f"{path}.{key}", 0, 1e6, open_low=True)
        scale, steps = cfg.TRAINER[self.node_name].SEARCH_SCALE, cfg.TRAINER[self.node_name].SEARCH_STEP
        if len(scale) != 2 or not all(0.1 < value < math.inf for value in scale):
            raise ValueError(f"Expected {path}.SEARCH_SCALE to be two numbers above 0.1 but got {scale}")
        if len(steps) != 2 or not all(isinstance(value, int) and value > 0 for value in steps):
            raise ValueError(f"Expected {path}.SEARCH_STEP to be two whole numbers above 0 but got {steps}")

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """The cache, empty until `prepare`."""
        n = len(self.dm.dataset.train_x)
        alpha, beta = float(self.node.ALPHA), float(self.node.BETA)
        return TipLearner(clip, classnames, zeroshot, n=n, alpha=alpha, beta=beta, trained=self.trained)

    def prepare(self, features: FeatureSet) -> None:
        """Fills the cache."""
        learner: Any = self.network.learner
        learner.keys.copy_(F.normalize(learner.compared(features.values).mean(dim=0), dim=-1))
        learner.key_labels.copy_(features.labels)

    def fit(self, features: FeatureSet) -> dict[str, float]:
        """Nothing but the cache, which is there -> its size."""
        return {"keys": float(len(features))}

    def choose(self) -> None:
        """Searches alpha and beta on validation images; without such images they stay the configured ones."""
        learner: Any = self.network.learner
        known = self.validation_features()
        if isinstance(known, str):
            chosen = {"alpha": float(learner.alpha), "beta": float(learner.beta)}
            self.note(chosen, f"TRAINER.{self.node_name}.ALPHA and .BETA ({known})", 0)
            return
        features, labels = known
        (beta_end, alpha_end), (betas, alphas) = self.node.SEARCH_SCALE, self.node.SEARCH_STEP
        choice = search_tip(
            learner.clip_logits(features),
            learner.compared(features) @ learner.keys.t(),
            learner.key_labels,
            labels,
            search_grid(alpha_end, alphas),
            search_grid(beta_end, betas),
        )
        learner.alpha.fill_(choice.alpha)
        learner.beta.fill_(choice.beta)
        self.write_scalar("val/tip_at_choice", choice.accuracy, self.epoch)
        self.note({"alpha": choice.alpha, "beta": choice.beta}, "val", len(labels))


@TRAINER_REGISTRY.register()
class TipAdapterF(TipAdapter):
    """The cache with trained keys; alpha and beta are the configured ones in training, and searched after it."""

    node_name = "TIPADAPTERF"
    model_name = "tip_f"
    main_head = "tip_f"
    trained = True
    drop_last = False

    @staticmethod
    def add_config(cfg: Any) -> None:
        """Adds TRAINER.TIPADAPTERF to `cfg` unless it is there."""
        add_tip_config(cfg, "TIPADAPTERF")

    def forward_backward(self, batch: Any) -> dict[str, float]:
        """See FeatureTrainer; with the configured alpha and beta, also after others have been chosen."""
        learner: Any = self.network.learner
        learner.alpha.fill_(float(self.node.ALPHA))
        learner.beta.fill_(float(self.node.BETA))
        return super().forward_backward(batch)

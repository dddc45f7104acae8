"""Tip-Adapter: a cache of the training images' features beside zero-shot CLIP; Tip-Adapter-F trains its keys.

Zhang et al., Tip-Adapter: Training-Free Adaption of CLIP for Few-Shot Classification, 2022.

    logits = s f W^T + alpha exp(-beta (1 - f K^T)) V

K are the features of the training images: CLIP's features are averaged over the views of an image, then normalized.
V are one-hot labels. alpha and beta are searched on validation images; grids and starting values are the source's,
per dataset (search.py). The source searches on test images for ImageNet, and picks the epoch of the trained variant
on test images everywhere; neither is done here.

Legend: B images, N keys, C classes, E width of the joint embedding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from ..base import CacheLearner, FeatureLearner, FeatureTrainer, MethodConfig, kept_views, key
from ..clip import CLIP, IMAGENET_TEMPLATES_SELECT
from ..features import FeatureSet
from ..log import DETAIL
from .search import GRIDS, Grid, best_point, cache_logits, grid_accuracy, grid_of, tip_values, values_origin

logger = logging.getLogger(__name__)


def tip_logits(
    features: Tensor, clip_logits: Tensor, keys: Tensor, key_labels: Tensor, alpha: float, beta: float
) -> Tensor:
    """Return zero-shot logits plus those of the cache, [B, C].

    Args:
        features: [B, E]. clip_logits: [B, C]. keys: [N, E]. key_labels: [N].
    """
    return clip_logits + alpha * cache_logits(features @ keys.t(), key_labels, clip_logits.shape[1], beta)


class TipLearner(CacheLearner):
    """The cache, whose keys are features of the training images.

    Args:
        n, alpha, beta: see CacheLearner.
        trained: whether the keys are trained.
    """

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
        super().__init__(clip, classnames, zeroshot, n=n, alpha=alpha, beta=beta)
        keys = torch.zeros(n, zeroshot.shape[1])
        if trained:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E]."""
        clip_logits, images = self.clip_logits(features), self.compared(features)
        alpha, beta = self.peek("alpha", self.alpha), self.peek("beta", self.beta)
        return tip_logits(images, clip_logits, self.keys, self.key_labels, alpha, beta)


def grid_key(default: str) -> Any:
    """Return the key GRID of a method whose own grid is `default`."""
    return key(
        default,
        "grid that is searched: Tip-Adapter's (tip), Tip-X's (tipx), or Tip-Adapter++'s and Tip-X++'s (overlap)",
        choices=tuple(GRIDS),
    )


@dataclass(frozen=True)
class TipConfig(MethodConfig):
    """Settings of Tip-Adapter."""

    views: int = kept_views(10)
    alpha: float = key(
        0.0,
        "weight of the cache where it is not searched; 0: the source's for the dataset, 1.17 to 10, and 1.17 for "
        "datasets that it does not have",
        low=0,
        source="by dataset; the paper's text: 1",
    )
    beta: float = key(
        0.0,
        "sharpness of the cache where it is not searched; 0: the source's",
        low=0,
        source="1; the paper's text: 5.5",
    )
    grid: str = grid_key("tip")
    search_scale: tuple[float, ...] = key(
        (), "upper ends of (beta, alpha), above the lower ones; (): the grid's", source="tip: by dataset"
    )
    search_step: tuple[int, ...] = key((), "numbers of values of (beta, alpha); (): the grid's", source="tip: 200, 20")

    def check(self, path: str) -> None:
        """Check the search over beta and alpha; see MethodConfig."""
        scale, steps = self.search_scale, self.search_step
        lows = (GRIDS[self.grid].beta.start, GRIDS[self.grid].alpha.start)
        if len(scale) not in (0, 2) or not all(low < end < math.inf for low, end in zip(lows, scale, strict=False)):
            raise ValueError(
                f"Expected {path}.SEARCH_SCALE to be () or two numbers, above {lows[0]:g} and {lows[1]:g}, "
                f"but got {scale}"
            )
        if len(steps) not in (0, 2) or not all(isinstance(value, int) and value > 0 for value in steps):
            raise ValueError(f"Expected {path}.SEARCH_STEP to be () or two whole numbers above 0 but got {steps}")


@TRAINER_REGISTRY.register()
class TipAdapter(FeatureTrainer):
    """Trainer of Tip-Adapter, the training-free cache."""

    recipe = 2
    node_name = "TIPADAPTER"
    paper = "Zhang et al. 2022"
    learns = "nothing; a cache of training features"
    cross_entropy = False
    config: type[MethodConfig] = TipConfig
    model_name = "tip"
    main_head = "tip"
    imagenet_templates = IMAGENET_TEMPLATES_SELECT
    of_each_class = "images in the cache"
    eps = 1e-4
    trained = False

    @property
    def initial(self) -> dict[str, float]:
        """The values of alpha and beta where they are not searched."""
        source = tip_values(self.cfg.DATASET.NAME)
        return {"alpha": float(self.settings.alpha or source.alpha), "beta": float(self.settings.beta or source.beta)}

    @property
    def search(self) -> Grid:
        """The grid that is searched."""
        settings = self.settings
        return grid_of(settings.grid, self.cfg.DATASET.NAME, settings.search_scale, settings.search_step)

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the cache, which is empty until `prepare`."""
        n = len(self.dm.dataset.train_x)
        return TipLearner(clip, classnames, zeroshot, n=n, **self.initial, trained=self.trained)

    def prepare(self, features: FeatureSet) -> None:
        """Fill the cache with the training images' features and labels."""
        learner: Any = self.network.learner
        learner.keys.copy_(F.normalize(learner.compared(features.mean()), dim=-1))
        learner.key_labels.copy_(features.labels)

    def fit(self, features: FeatureSet) -> dict[str, float]:
        """Return the size of the cache: `prepare` has filled it, and nothing else is to be fitted."""
        return {"keys": float(len(features))}

    def axes(self) -> dict[str, Any]:
        """Return the grid's values of alpha and beta."""
        return {"alphas": self.search.alpha.values(), "betas": self.search.beta.values()}

    def grid(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the accuracy (percent) at every point of the grid, [betas, gammas, alphas].

        Args:
            features, labels: those of the validation images.
        """
        learner: Any = self.network.learner
        affinity = learner.compared(features) @ learner.keys.t()
        return grid_accuracy(learner.clip_logits(features), affinity, learner.key_labels, labels, **self.axes())

    def choose(self) -> None:
        """Search the grid on validation images, or keep the initial values where there are no such images."""
        learner: Any = self.network.learner
        known = self.validation_features()
        if isinstance(known, str):
            self.keep_initial(known)
            return
        features, labels = known
        point = best_point(self.grid(features, labels), **self.axes(), first=self.search.first)
        chosen = {name: getattr(point, name) for name in self.initial}
        for name, value in chosen.items():
            getattr(learner, name).fill_(value)
        self.write_scalar(f"val/{self.main_head}_at_choice", point.accuracy, self.epoch)
        self.note_search(chosen, len(labels))

    def keep_initial(self, reason: str) -> None:
        """Keep the initial values and record why they were not searched."""
        learner: Any = self.network.learner
        for name, value in self.initial.items():
            getattr(learner, name).fill_(value)
        keys = ", ".join(f".{name.upper()}" for name in self.initial)
        self.note(self.initial, f"TRAINER.{self.node_name}{keys} ({reason})", 0)
        self._add_origin()

    def note_search(self, chosen: dict[str, float], n: int) -> None:
        """Record the values chosen on `n` validation images, the grid, and the initial values."""
        self.note(chosen, "val", n)
        search = self.search._asdict()
        for name in chosen:
            axis = search[name]
            bound = "to" if axis.closed else "to below"
            self.selected[name]["grid"] = f"{axis.steps} values from {axis.start:g} {bound} {axis.end:g}"
        self._add_origin()

    def _add_origin(self) -> None:
        for name in self.selected:
            self.selected[name]["initial"] = self.initial[name]
        logger.info(
            "Grid %s; initial values %s; what the configuration leaves open is that of %s",
            {name: choice.get("grid", "not searched") for name, choice in self.selected.items()},
            self.initial,
            values_origin(self.cfg.DATASET.NAME),
            extra=DETAIL,
        )


@dataclass(frozen=True)
class TipFConfig(TipConfig):
    """Settings of Tip-Adapter-F."""

    epoch_factor: int = key(
        0,
        "OPTIM.MAX_EPOCH is multiplied by this; 0: the source's factor",
        low=0,
        source="5 on EuroSAT (100 epochs in place of 20), 1 elsewhere",
    )


@TRAINER_REGISTRY.register()
class TipAdapterF(TipAdapter):
    """The cache with trained keys; training uses the initial alpha and beta, and others are searched after it."""

    node_name = "TIPADAPTERF"
    paper = "Zhang et al. 2022"
    learns = "the keys of a cache of training features"
    cross_entropy = True
    config = TipFConfig
    model_name = "tip_f"
    main_head = "tip_f"
    trained = True
    drop_last = False

    def _register(self, learner: FeatureLearner, optim_cfg: Any) -> None:
        factor = self.settings.epoch_factor or tip_values(self.cfg.DATASET.NAME).epoch_factor
        if factor > 1:
            optim_cfg = optim_cfg.clone()
            optim_cfg.defrost()
            optim_cfg.MAX_EPOCH *= factor
            self.max_epoch = optim_cfg.MAX_EPOCH
            logger.info("Epochs: %d, OPTIM.MAX_EPOCH times TRAINER.TIPADAPTERF.EPOCH_FACTOR", self.max_epoch)
        super()._register(learner, optim_cfg)

    def forward_backward(self, batch: Any) -> dict[str, float]:
        """Make one step with the initial alpha and beta, even after others have been chosen; see FeatureTrainer."""
        learner: Any = self.network.learner
        for name, value in self.initial.items():
            if learner.peek(name, getattr(learner, name)) != value:
                getattr(learner, name).fill_(value)
        return super().forward_backward(batch)

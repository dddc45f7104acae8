"""Tip-Adapter: a cache of the training images' features beside zero-shot CLIP; Tip-Adapter-F trains its keys.

Zhang et al., Tip-Adapter: Training-Free Adaption of CLIP for Few-Shot Classification, 2022.

    logits = s f W^T + alpha exp(-beta (1 - f K^T)) V

K are the training images' features, mean over their views as CLIP gives them and normalised then, V one-hot labels.
alpha and beta are searched on validation images; grids and starting values are the source's, per dataset
(tip_search.py). The source searches on test images for ImageNet, and picks the epoch of the trained variant on test
images everywhere, which is not done here.

Legend: B images, N keys, C classes, E width of the joint embedding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .clip import CLIP, IMAGENET_TEMPLATES_SELECT
from .clip.features import FeatureSet
from .common import check_choice, check_number, check_whole
from .frozen import FeatureLearner, FeatureTrainer
from .tip_search import GRIDS, Grid, best_point, cache_logits, grid_accuracy, grid_of, tip_values, values_origin

logger = logging.getLogger(__name__)


def tip_logits(
    features: Tensor, clip_logits: Tensor, keys: Tensor, key_labels: Tensor, alpha: float, beta: float
) -> Tensor:
    """Zero-shot logits plus those of the cache.

    Args:
        features: [B, E]. clip_logits: [B, C]. keys: [N, E]. key_labels: [N].
    """
    return clip_logits + alpha * cache_logits(features @ keys.t(), key_labels, clip_logits.shape[1], beta)


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
        alpha, beta = self.peek("alpha", self.alpha), self.peek("beta", self.beta)
        return tip_logits(images, clip_logits, self.keys, self.key_labels, alpha, beta)


def add_tip_config(cfg: Any, name: str, grid: str = "tip") -> None:
    """Add TRAINER.<name> to `cfg` unless it is there; `grid` is the default of its key GRID."""
    if name in cfg.TRAINER:
        return
    node = FeatureTrainer.new_node(cfg, views=10)
    # Weight of the cache where it is not searched, above 0; 0: the source's for the dataset, 1.17 to 10, and 1.17 for
    # datasets that it does not have (the paper's text: 1).
    node.ALPHA = 0.0
    node.BETA = 0.0  # its sharpness where it is not searched, above 0; 0: the source's, 1 (the paper's text: 5.5)
    node.GRID = grid  # that is searched: tip (Tip-Adapter's) | tipx (Tip-X's) | overlap (Tip-Adapter++'s and Tip-X++'s)
    node.SEARCH_SCALE = ()  # upper ends of (beta, alpha), above the lower ones; (): the grid's (tip: by dataset)
    node.SEARCH_STEP = ()  # numbers of values of (beta, alpha), at least 1; (): the grid's (tip: 200, 20)
    cfg.TRAINER[name] = node


@TRAINER_REGISTRY.register()
class TipAdapter(FeatureTrainer):
    """The training-free cache."""

    recipe = 2
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
        path, node = f"TRAINER.{self.node_name}", cfg.TRAINER[self.node_name]
        for key in ("ALPHA", "BETA"):
            check_number(cfg, f"{path}.{key}", 0, 1e6)
        check_choice(cfg, f"{path}.GRID", tuple(GRIDS))
        scale, steps = node.SEARCH_SCALE, node.SEARCH_STEP
        lows = (GRIDS[node.GRID].beta.start, GRIDS[node.GRID].alpha.start)
        if len(scale) not in (0, 2) or not all(low < end < math.inf for low, end in zip(lows, scale, strict=False)):
            raise ValueError(
                f"Expected {path}.SEARCH_SCALE to be () or two numbers, above {lows[0]:g} and {lows[1]:g}, "
                f"but got {scale}"
            )
        if len(steps) not in (0, 2) or not all(isinstance(value, int) and value > 0 for value in steps):
            raise ValueError(f"Expected {path}.SEARCH_STEP to be () or two whole numbers above 0 but got {steps}")

    @property
    def initial(self) -> dict[str, float]:
        """alpha and beta where they are not searched."""
        source = tip_values(self.cfg.DATASET.NAME)
        return {"alpha": float(self.node.ALPHA or source.alpha), "beta": float(self.node.BETA or source.beta)}

    @property
    def search(self) -> Grid:
        """The grid that is searched."""
        return grid_of(self.node, self.cfg.DATASET.NAME)

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """The cache, empty until `prepare`."""
        n = len(self.dm.dataset.train_x)
        return TipLearner(clip, classnames, zeroshot, n=n, **self.initial, trained=self.trained)

    def prepare(self, features: FeatureSet) -> None:
        """Fills the cache."""
        learner: Any = self.network.learner
        learner.keys.copy_(F.normalize(learner.compared(features.mean()), dim=-1))
        learner.key_labels.copy_(features.labels)

    def fit(self, features: FeatureSet) -> dict[str, float]:
        """Nothing but the cache, which is there -> its size."""
        return {"keys": float(len(features))}

    def axes(self) -> dict[str, Any]:
        """The grid's values of alpha and beta."""
        return {"alphas": self.search.alpha.values(), "betas": self.search.beta.values()}

    def grid(self, features: Tensor, labels: Tensor) -> Tensor:
        """Accuracy (percent) at every point of the grid: [betas, gammas, alphas].

        Args:
            features: of validation images. labels: theirs.
        """
        learner: Any = self.network.learner
        affinity = learner.compared(features) @ learner.keys.t()
        return grid_accuracy(learner.clip_logits(features), affinity, learner.key_labels, labels, **self.axes())

    def choose(self) -> None:
        """Searches the grid on validation images; without such images the values stay the initial ones."""
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
        """Keeps the initial values and records why they were not searched."""
        learner: Any = self.network.learner
        for name, value in self.initial.items():
            getattr(learner, name).fill_(value)
        keys = ", ".join(f".{name.upper()}" for name in self.initial)
        self.note(self.initial, f"TRAINER.{self.node_name}{keys} ({reason})", 0)
        self._add_origin()

    def note_search(self, chosen: dict[str, float], n: int) -> None:
        """Records what was chosen on `n` validation images, in which grid, and what it would have been without."""
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
        )


@TRAINER_REGISTRY.register()
class TipAdapterF(TipAdapter):
    """The cache with trained keys; alpha and beta are the initial ones in training, and searched after it."""

    node_name = "TIPADAPTERF"
    model_name = "tip_f"
    main_head = "tip_f"
    trained = True
    drop_last = False

    @staticmethod
    def add_config(cfg: Any) -> None:
        """Adds TRAINER.TIPADAPTERF to `cfg` unless it is there."""
        if "TIPADAPTERF" not in cfg.TRAINER:
            add_tip_config(cfg, "TIPADAPTERF")
            # OPTIM.MAX_EPOCH is multiplied by this, at least 1; 0: the source's factor, 5 on EuroSAT (100 epochs in
            # place of 20) and 1 elsewhere.
            cfg.TRAINER.TIPADAPTERF.EPOCH_FACTOR = 0

    def check_node(self, cfg: Any) -> None:
        """See LearnerTrainer."""
        super().check_node(cfg)
        check_whole(cfg, "TRAINER.TIPADAPTERF.EPOCH_FACTOR", 0)

    def _register(self, learner: FeatureLearner, optim_cfg: Any) -> None:
        factor = self.node.EPOCH_FACTOR or tip_values(self.cfg.DATASET.NAME).epoch_factor
        if factor > 1:
            optim_cfg = optim_cfg.clone()
            optim_cfg.defrost()
            optim_cfg.MAX_EPOCH *= factor
            self.max_epoch = optim_cfg.MAX_EPOCH
            logger.info("Epochs: %d, OPTIM.MAX_EPOCH times TRAINER.TIPADAPTERF.EPOCH_FACTOR", self.max_epoch)
        super()._register(learner, optim_cfg)

    def forward_backward(self, batch: Any) -> dict[str, float]:
        """See FeatureTrainer; with the initial alpha and beta, also after others have been chosen."""
        learner: Any = self.network.learner
        for name, value in self.initial.items():
            if learner.peek(name, getattr(learner, name)) != value:
                getattr(learner, name).fill_(value)
        return super().forward_backward(batch)

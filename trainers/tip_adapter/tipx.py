"""Tip-Adapter++: Tip-Adapter's cache on image features corrected for intra-modal overlap; Tip-X and Tip-X++.

Kravets and Namboodiri, CLIP Adaptation by Intra-modal Overlap Reduction, 2024; Udandarao et al., SuS-X, 2023 (Tip-X).

    Tip-Adapter++   s f W^T + alpha exp(-beta (1 - f' K'^T)) V
    Tip-X           s f W^T + alpha exp(-beta (1 - f K^T)) V - gamma psi(KL(softmax(f W^T/t) || softmax(k W^T/t))) V
    Tip-X++         Tip-X with f' and K' in the middle term, and in psi's range

f is the image feature as CLIP gives it, which must still match text; f' is the corrected one (MODEL.IMO_WEIGHTS). k and
K' are means over the views of the training images. t is a temperature, 0.5. psi rescales linearly such that the least
and the largest divergence become the least and the largest cosine similarity. Both ranges are taken over pairs of
different training images. (The source takes them over the pairs of a training and a tested image, so that a prediction
depends on what else is tested.)

Legend: B images, N keys, C classes, E width of the joint embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from ..base import CorrectedKeys, FeatureLearner, MethodConfig, key
from ..clip import CLIP
from ..features import FeatureSet
from .search import GRIDS, Grid, grid_accuracy, grid_of
from .tip import TipAdapter, TipConfig, TipLearner, grid_key


def divergences(queries: Tensor, keys: Tensor) -> Tensor:
    """Return KL(softmax(queries) || softmax(keys)) [B, N] of all pairs of queries [B, C] and keys [N, C].

    A divergence is a small difference of large sums, and psi stretches it: it is computed in float64. In float32 a
    prediction would depend on how a processor rounds, and so on how many images are in its batch.
    """
    log_p, log_q = (F.log_softmax(rows.double(), dim=-1) for rows in (queries, keys))
    p = log_p.exp()
    return ((p * log_p).sum(dim=-1, keepdim=True) - p @ log_q.t()).to(queries)


def scaling(kl: tuple[float, float], cosine: tuple[float, float]) -> tuple[float, float]:
    """Return the (c0, c1) with which -psi(x) = c0 - c1 x, psi being a line.

    Args:
        kl: least and largest divergence.
        cosine: least and largest cosine, to which psi maps the least and the largest divergence.
    """
    slope = (cosine[1] - cosine[0]) / max(kl[1] - kl[0], 1e-12)
    return slope * kl[0] - cosine[0], slope


@dataclass(frozen=True)
class TipPPConfig(TipConfig):
    """Settings of Tip-Adapter++."""

    grid: str = grid_key("overlap")


@TRAINER_REGISTRY.register()
class TipAdapterPP(TipAdapter):
    """Trainer of Tip-Adapter++, the training-free cache on corrected features."""

    node_name = "TIPADAPTERPP"
    paper = "Kravets and Namboodiri 2024"
    learns = "nothing; a cache of corrected features"
    config: type[MethodConfig] = TipPPConfig
    extra_keys = {"MODEL": CorrectedKeys}
    model_name = "tip_pp"
    main_head = "tip_pp"
    adapters = "needed"


class TipXLearner(TipLearner):
    """Tip-Adapter's cache, and original features of the training images, to compare their distributions over classes.

    Args:
        n, alpha, beta: see TipLearner.
        gamma: value until another is chosen.
        temperature: temperature of the distributions, above 0.
    """

    SAMPLES = ("key_labels", "keys", "key_originals")

    key_originals: Tensor  # [N, E]
    gamma: Tensor
    temperature: Tensor
    line: Tensor  # c0 and c1: a key's weight is c0 - c1 KL

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        zeroshot: Tensor,
        *,
        n: int,
        alpha: float,
        beta: float,
        gamma: float,
        temperature: float = 0.5,
    ) -> None:
        super().__init__(clip, classnames, zeroshot, n=n, alpha=alpha, beta=beta, trained=False)
        self.register_buffer("key_originals", torch.zeros(n, zeroshot.shape[1]))
        self.keep_number("gamma", gamma)
        self.keep_number("temperature", temperature)
        self.register_buffer("line", torch.tensor([0.0, 1.0], dtype=torch.float64))

    def take(self, state: Mapping[str, Tensor], indices: Sequence[int] | None = None) -> None:
        """Load a checkpoint's state; see Learner.

        Checkpoints of an earlier version, which weighed keys otherwise, are converted: they give the logits they gave.
        """
        # An earlier version kept "farthest": the largest divergence (t = 1) and the least cosine. Its weights were
        # linear, too: a divergence of 0 became 1, and the largest became exp(-beta (1 - cosine)).
        if "farthest" in state:
            state = dict(state)
            kl, cosine = state.pop("farthest").tolist()
            least = math.exp(-float(state["beta"]) * (1 - cosine))  # what the largest divergence became; 0 to 1
            state["line"] = torch.tensor([1.0, (1 - least) / max(kl, 1e-12)], dtype=torch.float64)
            state["temperature"] = torch.tensor(1.0, dtype=torch.float64)
        super().take(state, indices)

    def divergences(self, features: Tensor) -> Tensor:
        """Return the divergences [B, N] of images from the keys, for features of the images."""
        t = float(self.temperature)
        return divergences(self.original(features) @ self.zeroshot.t() / t, self._key_logits())

    def text(self, features: Tensor) -> Tensor:
        """Return the third term without gamma, [B, C], for features of images."""
        c0, c1 = self.line.tolist()
        weights = c0 - c1 * self.divergences(features)
        # shape[0], not len(), which would make the number of images a constant of an exported graph.
        return weights.new_zeros(weights.shape[0], len(self.zeroshot)).index_add(1, self.key_labels, weights)

    def find_range(self) -> None:
        """Set the ranges that divergences are rescaled from and to: those over pairs of different keys."""
        logits, n = self._key_logits(), len(self.keys)
        kl, cosine = (math.inf, -math.inf), (math.inf, -math.inf)
        everyone = torch.arange(n, device=self.keys.device)
        for rows in everyone.split(1024):
            others = rows[:, None] != everyone
            if n > 1:
                kl = _extended(kl, divergences(logits[rows], logits)[others])
                cosine = _extended(cosine, (self.keys[rows] @ self.keys.t())[others])
        self.line.copy_(torch.tensor(scaling(kl, cosine) if n > 1 else (0.0, 0.0)))

    def _key_logits(self) -> Tensor:
        return self.key_originals @ self.zeroshot.t() / float(self.temperature)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features of images."""
        return super().forward(features) + float(self.gamma) * self.text(features)


def _extended(bounds: tuple[float, float], values: Tensor) -> tuple[float, float]:
    return min(bounds[0], float(values.min())), max(bounds[1], float(values.max()))


@dataclass(frozen=True)
class TipXConfig(TipConfig):
    """Settings of Tip-X."""

    grid: str = grid_key("tipx")
    gamma: float = key(
        0.1, "weight of the third term where it is not searched (ours: the source always searches)", low=0
    )
    temperature: float = key(0.5, "t of the third term's distributions over cosines", above=0, source="0.5")
    gamma_scale: float = key(0.0, "upper end of gamma, above its lower one; 0: the grid's", low=0, source="30")
    gamma_step: int = key(0, "number of values of gamma; 0: the grid's", low=0, source="50")

    def check(self, path: str) -> None:
        """Check the search, of gamma too; see MethodConfig."""
        super().check(path)
        end, start = self.gamma_scale, GRIDS[self.grid].gamma.start
        if end and end <= start:
            raise ValueError(f"Expected {path}.GAMMA_SCALE to be 0 or above {start:g} but got {end}")


@TRAINER_REGISTRY.register()
class TipX(TipAdapterPP):
    """Tip-Adapter with a term that compares images by their distributions over classes, which the text gives."""

    node_name = "TIPX"
    paper = "Udandarao et al. 2023"
    learns = "nothing; a cache, and distributions over classes"
    config: type[MethodConfig] = TipXConfig
    extra_keys: dict[str, type] = {}
    model_name = "tipx"
    main_head = "tipx"
    adapters = "none"

    @property
    def initial(self) -> dict[str, float]:
        """The values of alpha, beta and gamma until others are chosen; see TipAdapter."""
        return {**super().initial, "gamma": self.settings.gamma}

    @property
    def search(self) -> Grid:
        """The grid of alpha, beta and gamma; see TipAdapter."""
        settings = self.settings
        return grid_of(
            settings.grid,
            self.cfg.DATASET.NAME,
            settings.search_scale,
            settings.search_step,
            settings.gamma_scale,
            settings.gamma_step,
        )

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the cache, which is empty until `prepare`."""
        n, temperature = len(self.dm.dataset.train_x), self.settings.temperature
        return TipXLearner(clip, classnames, zeroshot, n=n, **self.initial, temperature=temperature)

    def prepare(self, features: FeatureSet) -> None:
        """Fill the cache, and set the ranges that psi maps."""
        super().prepare(features)
        learner: Any = self.network.learner
        learner.key_originals.copy_(F.normalize(learner.original(features.mean()), dim=-1))
        learner.find_range()

    def axes(self) -> dict[str, Any]:
        """Return the grid's values of alpha, beta and gamma."""
        return {**super().axes(), "gammas": self.search.gamma.values()}

    def grid(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the accuracy at each point of the grid; see TipAdapter."""
        learner: Any = self.network.learner
        return grid_accuracy(
            learner.clip_logits(features),
            learner.compared(features) @ learner.keys.t(),
            learner.key_labels,
            labels,
            text=learner.text(features),
            **self.axes(),
        )


@dataclass(frozen=True)
class TipXPPConfig(TipXConfig):
    """Settings of Tip-X++."""

    grid: str = grid_key("overlap")


@TRAINER_REGISTRY.register()
class TipXPP(TipX):
    """Tip-X with the cache on corrected features."""

    node_name = "TIPXPP"
    paper = "Kravets and Namboodiri 2024"
    learns = "nothing; as TipX, on corrected features"
    config = TipXPPConfig
    extra_keys = {"MODEL": CorrectedKeys}
    model_name = "tipx_pp"
    main_head = "tipx_pp"
    adapters = "needed"

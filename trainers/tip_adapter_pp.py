"""Tip-Adapter++: Tip-Adapter's cache on image features corrected for intra-modal overlap; Tip-X and Tip-X++.

Kravets and Namboodiri, CLIP Adaptation by Intra-modal Overlap Reduction, 2024; Udandarao et al., SuS-X, 2023 (Tip-X).

    Tip-Adapter++   s f W^T + alpha exp(-beta (1 - f' K'^T)) V
    Tip-X           s f W^T + alpha exp(-beta (1 - f K^T)) V + gamma psi(-KL(softmax(f W^T) || softmax(k W^T))) V
    Tip-X++         Tip-X with f' and K' in the middle term

f is the image feature as CLIP gives it, which must still match text, f' the corrected one (MODEL.IMO_WEIGHTS); k and K'
are means over the views of the training images. psi rescales linearly to the range of the cache's weights: 0 to 1 and
the divergence of the two training images that are farthest from each other to the weight of the two least alike. (The
source takes the extremes over all test images, so that a prediction depends on what else is tested.)

Legend: B images, N keys, C classes, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .clip import CLIP
from .clip.features import FeatureSet
from .common import check_number
from .frozen import FeatureLearner
from .imo.adapters import add_imo_weights
from .tip_adapter import TipAdapter, TipLearner, add_tip_config, cache_logits, search_grid


def divergences(queries: Tensor, keys: Tensor) -> Tensor:
    """KL(softmax(queries) || softmax(keys)) of all pairs: [B, C], [N, C] -> [B, N]."""
    log_p, log_q = F.log_softmax(queries, dim=-1), F.log_softmax(keys, dim=-1)
    p = log_p.exp()
    return (p * log_p).sum(dim=-1, keepdim=True) - p @ log_q.t()


def rescaled(kl: Tensor, farthest: float, least: float) -> Tensor:
    """psi: -kl, linearly, such that 0 becomes 1 and `farthest` becomes `least`."""
    return 1 - (1 - least) * kl / max(farthest, 1e-12)


def grid_accuracy(
    clip_logits: Tensor,
    affinity: Tensor,
    key_labels: Tensor,
    labels: Tensor,
    alphas: Sequence[float],
    betas: Sequence[float],
    kl: Tensor | None = None,
    gammas: Sequence[float] = (0.0,),
    farthest: tuple[float, float] = (1.0, 0.0),
) -> Tensor:
    """Accuracy (percent) at every point of the grid: [betas, gammas, alphas].

    Args:
        clip_logits: [n, C]. affinity: [n, N], cosines. key_labels: [N]. labels: [n].
        kl: [n, N], Tip-X's divergences; None: without that term.
        farthest: largest divergence and least cosine among the keys.
    """
    out = torch.zeros(len(betas), len(gammas), len(alphas), dtype=torch.float64)
    steps = torch.tensor(alphas, device=clip_logits.device)[:, None, None]
    for i, beta in enumerate(betas):
        cache = steps * cache_logits(affinity, key_labels, clip_logits.shape[1], beta)  # [alphas, n, C]
        text: Tensor | float = 0.0
        if kl is not None:
            weights = rescaled(kl, farthest[0], _weight(farthest[1], beta))
            text = torch.zeros_like(clip_logits).index_add(1, key_labels, weights)
        for j, gamma in enumerate(gammas):
            logits = clip_logits + gamma * text + cache
            out[i, j] = 100.0 * (logits.argmax(dim=-1) == labels).double().mean(dim=-1).cpu()
    return out


def _weight(cosine: float, beta: float) -> float:
    return float(torch.exp(torch.tensor(-beta * (1 - cosine), dtype=torch.float64)))


class GridPoint(NamedTuple):
    """A point of the grid, and its accuracy (percent) on the images it was chosen on."""

    alpha: float
    beta: float
    gamma: float
    accuracy: float


def best_point(
    accuracy: Tensor, alphas: Sequence[float], betas: Sequence[float], gammas: Sequence[float] = (0.0,)
) -> GridPoint:
    """The point with the highest accuracy [betas, gammas, alphas]; of equals the first."""
    place = int((accuracy.flatten() == accuracy.max()).nonzero()[0])
    i, rest = divmod(place, len(gammas) * len(alphas))
    j, k = divmod(rest, len(alphas))
    return GridPoint(alphas[k], betas[i], gammas[j], float(accuracy.max()))


@TRAINER_REGISTRY.register()
class TipAdapterPP(TipAdapter):
    """The training-free cache on corrected features."""

    node_name = "TIPADAPTERPP"
    model_name = "tip_pp"
    main_head = "tip_pp"
    adapters = "needed"

    @staticmethod
    def add_config(cfg: Any) -> None:
        """Adds TRAINER.TIPADAPTERPP and MODEL.IMO_WEIGHTS to `cfg` unless they are there."""
        add_tip_config(cfg, "TIPADAPTERPP")
        add_imo_weights(cfg)

    def axes(self) -> dict[str, Any]:
        """The grid's values of alpha and beta."""
        (beta_end, alpha_end), (betas, alphas) = self.node.SEARCH_SCALE, self.node.SEARCH_STEP
        return {"alphas": search_grid(alpha_end, alphas), "betas": search_grid(beta_end, betas)}

    def grid(self, features: Tensor, labels: Tensor) -> Tensor:
        """Accuracy (percent) at every point of the grid: [betas, gammas, alphas].

        Args:
            features: of validation images. labels: theirs.
        """
        learner: Any = self.network.learner
        affinity = learner.compared(features) @ learner.keys.t()
        return grid_accuracy(learner.clip_logits(features), affinity, learner.key_labels, labels, **self.axes())


class TipXLearner(TipLearner):
    """Tip-Adapter's cache, and the training images' original features, whose distributions over classes are compared.

    Args:
        n, alpha, beta: see TipLearner.
        gamma: until another is chosen.
    """

    SAMPLES = ("key_labels", "keys", "key_originals")

    key_originals: Tensor  # [N, E]
    gamma: Tensor
    farthest: Tensor  # largest divergence and least cosine of two keys

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
    ) -> None:
        super().__init__(clip, classnames, zeroshot, n=n, alpha=alpha, beta=beta, trained=False)
        self.register_buffer("key_originals", torch.zeros(n, zeroshot.shape[1]))
        self.register_buffer("gamma", torch.tensor(gamma, dtype=torch.float64))
        self.register_buffer("farthest", torch.tensor([1.0, 0.0], dtype=torch.float64))

    def divergences(self, features: Tensor) -> Tensor:
        """Features of images -> their divergences from the keys, [B, N]."""
        return divergences(self.original(features) @ self.zeroshot.t(), self.key_originals @ self.zeroshot.t())

    def find_farthest(self) -> None:
        """Sets the range that divergences are rescaled from, and to."""
        originals = self.key_originals @ self.zeroshot.t()
        kl, cosine = 0.0, 1.0
        for rows in torch.arange(len(self.keys), device=self.keys.device).split(1024):
            kl = max(kl, float(divergences(originals[rows], originals).max()))
            cosine = min(cosine, float((self.keys[rows] @ self.keys.t()).min()))
        self.farthest.copy_(torch.tensor([kl, cosine]))

    def forward(self, features: Tensor) -> Tensor:
        """Features -> logits [B, C]."""
        largest, least = self.farthest.tolist()
        weights = rescaled(self.divergences(features), largest, _weight(least, float(self.beta)))
        text = weights.new_zeros(len(weights), len(self.zeroshot)).index_add(1, self.key_labels, weights)
        return super().forward(features) + float(self.gamma) * text


@TRAINER_REGISTRY.register()
class TipX(TipAdapterPP):
    """Tip-Adapter with a term that compares images by what they look like to the text."""

    node_name = "TIPX"
    model_name = "tipx"
    main_head = "tipx"
    adapters = "none"

    @staticmethod
    def add_config(cfg: Any) -> None:
        """Adds TRAINER.TIPX to `cfg` unless it is there."""
        _add_tipx_config(cfg, "TIPX")

    def check_node(self, cfg: Any) -> None:
        """See LearnerTrainer."""
        super().check_node(cfg)
        path = f"TRAINER.{self.node_name}"
        check_number(cfg, f"{path}.GAMMA", 0, 1e6)
        check_number(cfg, f"{path}.GAMMA_SCALE", 0.1, 1e6, open_low=True)
        steps = cfg.TRAINER[self.node_name].GAMMA_STEP
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"Expected {path}.GAMMA_STEP to be a whole number above 0 but got {steps!r}")

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """The cache, empty until `prepare`."""
        node, n = self.node, len(self.dm.dataset.train_x)
        alpha, beta, gamma = float(node.ALPHA), float(node.BETA), float(node.GAMMA)
        return TipXLearner(clip, classnames, zeroshot, n=n, alpha=alpha, beta=beta, gamma=gamma)

    def prepare(self, features: FeatureSet) -> None:
        """Fills the cache."""
        super().prepare(features)
        learner: Any = self.network.learner
        learner.key_originals.copy_(F.normalize(learner.original(features.values).mean(dim=0), dim=-1))
        learner.find_farthest()

    def axes(self) -> dict[str, Any]:
        """The grid's values of alpha, beta and gamma."""
        return {**super().axes(), "gammas": search_grid(self.node.GAMMA_SCALE, self.node.GAMMA_STEP)}

    def grid(self, features: Tensor, labels: Tensor) -> Tensor:
        """See TipAdapterPP."""
        learner: Any = self.network.learner
        return grid_accuracy(
            learner.clip_logits(features),
            learner.compared(features) @ learner.keys.t(),
            learner.key_labels,
            labels,
            kl=learner.divergences(features),
            farthest=tuple(learner.farthest.tolist()),
            **self.axes(),
        )

    def choose(self) -> None:
        """Searches alpha, beta and gamma on validation images; without such images they stay the configured ones."""
        learner: Any = self.network.learner
        known = self.validation_features()
        if isinstance(known, str):
            chosen = {name: float(getattr(learner, name)) for name in ("alpha", "beta", "gamma")}
            self.note(chosen, f"TRAINER.{self.node_name}.ALPHA, .BETA and .GAMMA ({known})", 0)
            return
        features, labels = known
        point = best_point(self.grid(features, labels), **self.axes())
        chosen = {"alpha": point.alpha, "beta": point.beta, "gamma": point.gamma}
        for name, value in chosen.items():
            getattr(learner, name).fill_(value)
        self.write_scalar("val/tipx_at_choice", point.accuracy, self.epoch)
        self.note(chosen, "val", len(labels))


def _add_tipx_config(cfg: Any, name: str) -> None:
    if name in cfg.TRAINER:
        return
    add_tip_config(cfg, name)
    node = cfg.TRAINER[name]
    node.SEARCH_STEP = (50, 20)  # a grid of three: fewer values of beta than Tip-Adapter's 200
    node.GAMMA = 0.1  # weight of the third term where it is not searched, at least 0 (our choice)
    node.GAMMA_SCALE = 3.0  # upper end of its grid, which starts at 0.1 (our choice: as alpha's)
    node.GAMMA_STEP = 20  # number of values in it, at least 1


@TRAINER_REGISTRY.register()
class TipXPP(TipX):
    """Tip-X with the cache on corrected features."""

    node_name = "TIPXPP"
    model_name = "tipx_pp"
    main_head = "tipx_pp"
    adapters = "needed"

    @staticmethod
    def add_config(cfg: Any) -> None:
        """Adds TRAINER.TIPXPP and MODEL.IMO_WEIGHTS to `cfg` unless they are there."""
        _add_tipx_config(cfg, "TIPXPP")
        add_imo_weights(cfg)

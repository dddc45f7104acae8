"""APE: a cache on chosen channels beside zero-shot CLIP, its keys weighed by the texts; APE-T learns a residual.

Zhu et al., Not All Features Matter: Enhancing Few-shot CLIP with Adaptive Prior Refinement, 2023.

    APE      s f T^T + alpha exp(-beta (1 - f' K'^T)) (V o exp(gamma KL))
    APE-T    s f (T + R)^T + alpha exp(-beta (1 - f (K + R_V)^T)) (V o u)

' stands for Q chosen channels, normalized again. K are the features of the training images: CLIP's features are
averaged over the views of an image, then normalized. V are one-hot labels, and KL is the divergence of a key's label
from softmax(K' T'^T), in bits. R is learnt, one row for each class, and zero outside the chosen channels; R_V has the
row of each key's class. u is one learnt weight for each key.

The channels are those with the highest -w S + (1 - w) D. S is the mean product of two samples of different classes in a
channel, which should be small. D is the variance of the texts T in it. Samples are texts and keys for APE, texts alone
for APE-T.

Q, w, alpha, beta, gamma and the ends of the grid are the source's by dataset; here there is one setting for all, about
the median of theirs. alpha, beta and (APE) gamma are searched on validation images.

Legend: B images, N keys, C classes, E width of the joint embedding, Q chosen channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import CacheLearner, FeatureLearner, FeatureTrainer, MethodConfig, kept_views, key
from .base.search import Axis, best_place, check_grid
from .clip import CLIP, IMAGENET_TEMPLATES_SELECT
from .features import FeatureSet
from .modules.cache import cache_accuracy, cache_logits
from .modules.gaussian import class_sums

STARTS = {"beta": 0.1, "alpha": 0.1, "gamma": 0.0}  # where the axes of the grid begin, in the order of the keys
SMALL = 1e-6  # added to probabilities before their logarithm is taken


def channel_scores(
    texts: Tensor, weight: float, keys: Tensor | None = None, key_labels: Tensor | None = None
) -> Tensor:
    """Return how well each channel tells classes apart, [E], float64.

    Args:
        texts: [C, E], normalized.
        weight: w, between 0 and 1.
        keys, key_labels: [N, E] and [N], which count beside the texts; None: the texts alone.
    """
    sums, counts = texts.double(), torch.ones(len(texts), dtype=torch.float64, device=texts.device)
    if len(texts) == 1:  # nothing is to be told apart
        return torch.zeros_like(sums[0])
    variance = sums.var(dim=0)
    if keys is not None and key_labels is not None:
        sums = sums + class_sums(keys.double(), key_labels, len(texts))
        counts = counts + key_labels.bincount(minlength=len(texts))
    # The sum over all pairs is the square of the sum; pairs of the same class are taken out.
    pairs = counts.sum().square() - counts.square().sum()
    similarity = (sums.sum(dim=0).square() - sums.square().sum(dim=0)) / pairs
    return (1 - weight) * variance - weight * similarity


def divergences(keys: Tensor, key_labels: Tensor, texts: Tensor) -> Tensor:
    """Return KL [N], in bits, of the keys' labels from what the texts say about the keys.

    Args:
        keys: K', [N, Q], normalized. key_labels: [N]. texts: T', [C, Q], normalized.
    """
    probability = (keys @ texts.t()).softmax(dim=1).gather(1, key_labels[:, None]).squeeze(1)
    return torch.log2((1 + SMALL) / (probability + SMALL))


def number_of_channels(share: float, width: int) -> int:
    """Return Q for a share of the channels, at least 1."""
    return max(1, round(share * width))


class ChannelLearner(CacheLearner):
    """The cache on chosen channels, as both forms have it.

    Args:
        q: number of chosen channels, Q.
        cache: n, alpha and beta; see CacheLearner.
    """

    channels: Tensor

    def __init__(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, *, q: int, **cache: Any) -> None:
        super().__init__(clip, classnames, zeroshot, **cache)
        self.register_buffer("channels", torch.arange(q))


class APELearner(ChannelLearner):
    """The cache on chosen channels, and the divergences of its keys.

    Args:
        n, q, alpha, beta: see ChannelLearner.
        gamma: value until another is chosen.
    """

    SAMPLES = ("key_labels", "keys", "divergence")

    keys: Tensor  # K', [N, Q]
    divergence: Tensor  # [N]
    gamma: Tensor

    def __init__(
        self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, *, gamma: float, **arguments: Any
    ) -> None:
        super().__init__(clip, classnames, zeroshot, **arguments)
        self.register_buffer("keys", torch.zeros(len(self.key_labels), len(self.channels)))
        self.register_buffer("divergence", torch.zeros(len(self.key_labels)))
        self.keep_number("gamma", gamma)

    def on_channels(self, features: Tensor) -> Tensor:
        """Return the chosen channels [B, Q] of features [B, E], normalized again."""
        return F.normalize(features[:, self.channels], dim=-1)

    def fill(self, keys: Tensor, key_labels: Tensor, weight: float) -> None:
        """Choose channels, and keep the keys [N, E], which have labels [N]."""
        scores = channel_scores(self.zeroshot, weight, keys, key_labels)
        self.channels.copy_(scores.topk(len(self.channels)).indices.sort().values)
        self.keys.copy_(self.on_channels(keys))
        self.key_labels.copy_(key_labels)
        self.divergence.copy_(divergences(self.keys, key_labels, self.on_channels(self.zeroshot)))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E]."""
        alpha, beta, gamma = (self.peek(name, getattr(self, name)) for name in ("alpha", "beta", "gamma"))
        affinity, strength = self.on_channels(features) @ self.keys.t(), torch.exp(gamma * self.divergence)
        cache = cache_logits(affinity, self.key_labels, len(self.zeroshot), beta, strength)
        return self.clip_logits(features) + alpha * cache

    def for_classes(
        self, state: dict[str, Tensor], trained: Sequence[str] | None, indices: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """Return `state` with the keys of the present classes only.

        Divergences are those among the present classes: for a part of the classes they are computed anew.

        Raises:
            ValueError: a present class is not among those trained on.
        """
        found = super().for_classes(state, trained, indices)
        if len(found["keys"]) == len(state["keys"]):
            return found
        own = {name: found[name].to(self.zeroshot.device) for name in ("keys", "key_labels", "channels")}
        texts = F.normalize(self.zeroshot[:, own["channels"]], dim=-1)
        return {**found, "divergence": divergences(own["keys"], own["key_labels"], texts)}


class APETLearner(ChannelLearner):
    """The cache, the residual R on chosen channels, and the weights u of the keys.

    Args:
        n, q, alpha, beta: see ChannelLearner. Training uses these alpha and beta, whatever has been chosen.
    """

    CLASS_ROWS = ("residual",)
    SAMPLES = ("key_labels", "keys", "strength")

    keys: Tensor  # K, [N, E]

    def __init__(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, **arguments: Any) -> None:
        super().__init__(clip, classnames, zeroshot, **arguments)
        self.given = float(arguments["alpha"]), float(arguments["beta"])
        self.register_buffer("keys", torch.zeros(len(self.key_labels), zeroshot.shape[1]))
        self.residual = nn.Parameter(torch.zeros(len(zeroshot), len(self.channels)))
        self.strength = nn.Parameter(torch.ones(len(self.key_labels)))

    def fill(self, keys: Tensor, key_labels: Tensor, weight: float) -> None:
        """Choose channels by the texts, and keep the keys [N, E], which have labels [N]."""
        scores = channel_scores(self.zeroshot, weight)
        self.channels.copy_(scores.topk(len(self.channels)).indices.sort().values)
        self.keys.copy_(keys)
        self.key_labels.copy_(key_labels)

    def parts(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of texts with their residual [B, C], and affinities to keys with theirs [B, N]."""
        moved = features[:, self.channels] @ self.residual.t()  # f R^T, [B, C]
        affinity = features @ self.keys.t() + moved[:, self.key_labels]
        return self.clip_logits(features) + self.scale * moved, affinity

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E]."""
        clip_logits, affinity = self.parts(features)
        chosen = (self.peek("alpha", self.alpha), self.peek("beta", self.beta))
        alpha, beta = self.given if self.training else chosen
        return clip_logits + alpha * cache_logits(affinity, self.key_labels, len(self.zeroshot), beta, self.strength)


def share_of_channels(default: float, source: str) -> Any:
    """Return the key CHANNELS."""
    return key(default, "share of the channels that is chosen", above=0, high=1, source=source)


def weight_of_similarity(default: float, source: str) -> Any:
    """Return the key WEIGHT."""
    about = "w: what the similarity of classes counts in the choice of channels; the variance of the texts counts 1 - w"
    return key(default, about, low=0, high=1, source=source)


@dataclass(frozen=True)
class APEConfig(MethodConfig):
    """Settings of APE."""

    views: int = kept_views(10, source="10")
    channels: float = share_of_channels(0.68, "400 to 800 of RN50's 1024, by dataset: 0.39 to 0.78")
    weight: float = weight_of_similarity(0.5, "0.1 to 0.9, by dataset")
    alpha: float = key(2.0, "weight of the cache where it is not searched", low=0, source="0.8 to 5, by dataset")
    beta: float = key(1.0, "sharpness of the cache where it is not searched", low=0, source="1")
    gamma: float = key(0.1, "what a key's divergence counts where it is not searched", low=0, source="0.1")
    search_scale: tuple[float, ...] = key(
        (7.0, 7.0, 1.0),
        "upper ends of (beta, alpha, gamma), which start at 0.1, 0.1 and 0; the ends are left out",
        source="7 to 30, 5 to 10, 0.5 to 1.5, by dataset",
    )
    search_step: tuple[int, ...] = key(
        (200, 20, 20), "numbers of values of (beta, alpha, gamma)", source="200, 20, 20, and 200, 20, 5 on ImageNet"
    )

    def check(self, path: str) -> None:
        """Check the search over gamma, beta and alpha; see MethodConfig."""
        check_grid(path, self.search_scale, self.search_step, list(STARTS.values()))


@TRAINER_REGISTRY.register()
class APE(FeatureTrainer):
    """Trainer of APE, the training-free form."""

    paper = "Zhu et al. 2023"
    learns = "nothing; a cache on chosen channels"
    cross_entropy = False
    config: type[MethodConfig] = APEConfig
    imagenet_templates = IMAGENET_TEMPLATES_SELECT
    of_each_class = "images in the cache"
    searched: tuple[str, ...] = tuple(STARTS)  # axes of the grid, outermost first: of equal points the first is taken

    @property
    def initial(self) -> dict[str, float]:
        """The values of what is searched, before and without a search."""
        return {name: getattr(self.settings, name) for name in self.searched}

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the cache, which is empty until `prepare`."""
        n, q = len(self.dm.dataset.train_x), number_of_channels(self.settings.channels, zeroshot.shape[1])
        return APELearner(clip, classnames, zeroshot, n=n, q=q, **self.initial)

    def prepare(self, features: FeatureSet) -> None:
        """Choose the channels, and fill the cache with the training images' features and labels."""
        learner: Any = self.network.learner
        learner.fill(F.normalize(features.mean(), dim=-1), features.labels, self.settings.weight)

    def fit(self, features: FeatureSet) -> dict[str, float]:
        """Return the size of the cache: `prepare` has filled it, and nothing else is to be fitted."""
        return {"keys": float(len(features))}

    def axes(self) -> list[list[float]]:
        """Return the grid's values of what is searched."""
        ends = zip(self.searched, self.settings.search_scale, self.settings.search_step, strict=True)
        return [Axis(STARTS[name], float(end), steps).values() for name, end, steps in ends]

    def grid(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the accuracy (percent) on validation images at every point of the grid, [betas, alphas, gammas]."""
        learner: Any = self.network.learner
        betas, alphas, gammas = self.axes()
        affinity = learner.on_channels(features) @ learner.keys.t()
        strengths = torch.exp(torch.tensor(gammas).to(affinity)[:, None] * learner.divergence)
        return cache_accuracy(
            learner.clip_logits(features), affinity, learner.key_labels, labels, betas, alphas, strengths
        )

    def choose(self) -> None:
        """Search the grid on validation images, or keep the initial values where there are no such images."""
        learner: Any = self.network.learner
        known, chosen = self.validation_features(), self.initial
        if isinstance(known, str):
            keys = ", ".join(f".{name.upper()}" for name in chosen)
            self.note(chosen, f"TRAINER.{self.node_name}{keys} ({known})", 0)
        else:
            accuracy = self.grid(*known)
            place = best_place(accuracy)
            chosen = {name: axis[i] for name, axis, i in zip(self.searched, self.axes(), place, strict=False)}
            self.write_scalar(f"val/{self.main_head}_at_choice", float(accuracy.max()), self.epoch)
            self.note(chosen, "val", len(known[1]))
        for name, value in chosen.items():
            getattr(learner, name).fill_(value)


@dataclass(frozen=True)
class APETConfig(MethodConfig):
    """Settings of APE-T."""

    views: int = kept_views(10)
    channels: float = share_of_channels(0.78, "500 to 900 of RN50's 1024, by dataset: 0.49 to 0.88")
    weight: float = weight_of_similarity(0.2, "0.2")
    alpha: float = key(
        2.0, "weight of the cache in training, and where it is not searched", low=0, source="0.8 to 5, by dataset"
    )
    beta: float = key(1.0, "sharpness of the cache in training, and where it is not searched", low=0, source="1")
    search_scale: tuple[float, ...] = key(
        (7.0, 7.0),
        "upper ends of (beta, alpha), which start at 0.1; the ends are left out",
        source="7 to 30, 5 to 10, by dataset",
    )
    search_step: tuple[int, ...] = key((200, 20), "numbers of values of (beta, alpha)", source="200, 20")

    def check(self, path: str) -> None:
        """Check the search over beta and alpha; see MethodConfig."""
        check_grid(path, self.search_scale, self.search_step, [STARTS["beta"], STARTS["alpha"]])


@TRAINER_REGISTRY.register()
class APET(APE):
    """Trainer of APE-T: a residual of each class on its text and its keys, and a weight of each key."""

    node_name = "APET"
    paper = "Zhu et al. 2023"
    learns = "a residual on texts and keys, and a weight of each key"
    cross_entropy = True
    config = APETConfig
    model_name = "ape_t"
    main_head = "ape_t"
    searched = ("beta", "alpha")
    eps = 1e-3
    per_step = True
    drop_last = False

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the cache, which is empty until `prepare`, and the residual, which is zero."""
        n, q = len(self.dm.dataset.train_x), number_of_channels(self.settings.channels, zeroshot.shape[1])
        return APETLearner(clip, classnames, zeroshot, n=n, q=q, **self.initial)

    def grid(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the accuracy (percent) on validation images at every point of the grid, [betas, alphas, 1]."""
        learner: Any = self.network.learner
        clip_logits, affinity = learner.parts(features)
        betas, alphas = self.axes()
        strengths = learner.strength[None]
        return cache_accuracy(clip_logits, affinity, learner.key_labels, labels, betas, alphas, strengths)

"""DAC: a linear map of image features for a cache, trained by comparing images; then texts trained beside it.

After Gondal et al., Domain Aligned CLIP for Few-shot Classification, 2024. Its code is not public.

    logits = s f T^T + alpha exp(-beta (1 - h(f) h(K)^T)) V        h(f) = normalize(f H),  H = I at first

K are the features of the training images: CLIP's features are averaged over the views of an image, then normalized. V
are one-hot labels. H is trained by the supervised contrastive loss of Khosla et al., 2020: each view of an image is to
be nearer to the views of its class than to all others of the batch. This is DAC-V. DAC-VT then keeps H, and trains the
rows of T, which start as the zero-shot weights, by the cross-entropy of the logits. alpha and beta are searched on
validation images.

Legend: V views, B images, N keys, C classes, E width of the joint embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import CacheLearner, FeatureLearner, FeatureTrainer, MethodConfig, key
from .base.search import Axis, best_place, check_grid
from .clip import CLIP, IMAGENET_TEMPLATES_SELECT
from .features import FeatureSet
from .modules.cache import cache_accuracy, cache_logits

START = 0.1  # where both axes of the grid begin


def supervised_contrast(rows: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the supervised contrastive loss of normalized rows [n, E] with labels [n], a mean over the rows.

    With t the temperature, row i has the mean, over the other rows p of its class, of
    log(sum over all j but i of exp(i j / t)) - i p / t. Rows that are the only one of their class do not count.
    """
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    similar = (rows @ rows.t() / temperature).masked_fill(itself, -torch.inf)
    same = (labels[:, None] == labels) & ~itself
    apart = similar.logsumexp(dim=1, keepdim=True) - similar
    own = apart.masked_fill(~same, 0.0).sum(dim=1)
    counts = same.sum(dim=1)
    return (own / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


class DACLearner(CacheLearner):
    """The map H, the cache, alpha and beta, and in DAC-VT the rows of T.

    Args:
        n: see CacheLearner.
        alpha, beta: what training of texts uses, and what counts until others are chosen.
        texts: whether the rows of T are learnt.
    """

    keys: Tensor  # before H

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        zeroshot: Tensor,
        *,
        n: int,
        alpha: float,
        beta: float,
        texts: bool,
    ) -> None:
        super().__init__(clip, classnames, zeroshot, n=n, alpha=alpha, beta=beta)
        self.given = float(alpha), float(beta)
        self.matrix = nn.Parameter(torch.eye(zeroshot.shape[1]))
        self.texts: nn.Parameter | None = None
        if texts:
            self.CLASS_ROWS = ("texts",)
            self.texts = nn.Parameter(self.zeroshot.clone())
        self.register_buffer("keys", torch.zeros(n, zeroshot.shape[1]))

    def mapped(self, features: Tensor) -> Tensor:
        """Return h(f), [..., E], for features [..., E]."""
        return F.normalize(features @ self.matrix, dim=-1)

    def parts(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the texts [B, C], and affinities to the keys [B, N], which give H no gradient."""
        texts = self.zeroshot if self.texts is None else F.normalize(self.texts, dim=-1)
        with torch.no_grad():
            affinity = self.mapped(features) @ self.mapped(self.keys).t()
        return self.scale * features @ texts.t(), affinity

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E]."""
        text_logits, affinity = self.parts(features)
        chosen = (self.peek("alpha", self.alpha), self.peek("beta", self.beta))
        alpha, beta = self.given if self.training else chosen
        return text_logits + alpha * cache_logits(affinity, self.key_labels, len(self.zeroshot), beta)


class Outputs(NamedTuple):
    """Logits [B, V, C], and mapped features [B, V, E]; these are None where texts are trained."""

    logits: Tensor
    mapped: Tensor | None


@dataclass(frozen=True)
class DACConfig(MethodConfig):
    """Settings of DAC."""

    views: int = key(
        7, "seeded augmentations of each training image, encoded once; each step has all of them", low=2, source="7"
    )
    form: str = key("V", "V: the map H; VT: then the texts, too", choices=("V", "VT"), source="both")
    temperature: float = key(0.07, "temperature of the contrastive loss", above=0)
    text_share: float = key(0.5, "share of the epochs, the last ones, that train texts; with FORM VT", above=0, below=1)
    alpha: float = key(1.0, "weight of the cache in the training of texts, and where it is not searched", low=0)
    beta: float = key(5.5, "sharpness of the cache, likewise", low=0)
    search_scale: tuple[float, ...] = key(
        (7.0, 3.0), "upper ends of (beta, alpha), which start at 0.1; the ends are left out"
    )
    search_step: tuple[int, ...] = key((200, 20), "numbers of values of (beta, alpha)")

    def check(self, path: str) -> None:
        """Check the search over beta and alpha; see MethodConfig."""
        check_grid(path, self.search_scale, self.search_step, (START, START))


@TRAINER_REGISTRY.register()
class DAC(FeatureTrainer):
    """A map of image features for a cache, trained by comparing images; then texts."""

    paper = "after Gondal et al. 2024"
    learns = "a linear map of image features for a cache, and class texts"
    cross_entropy = False
    config = DACConfig
    imagenet_templates = IMAGENET_TEMPLATES_SELECT
    of_each_class = "images in the cache"
    drop_last = False
    network: Any

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the map, which starts as the identity, and the cache, which is empty until `prepare`."""
        settings = self.settings
        return DACLearner(
            clip,
            classnames,
            zeroshot,
            n=len(self.dm.dataset.train_x),
            alpha=settings.alpha,
            beta=settings.beta,
            texts=settings.form == "VT",
        )

    def prepare(self, features: FeatureSet) -> None:
        """Fill the cache with the training images' features and labels."""
        learner = self.network.learner
        learner.keys.copy_(F.normalize(features.mean(), dim=-1))
        learner.key_labels.copy_(features.labels)

    def trains_texts(self) -> bool:
        """Return whether this epoch trains texts; the first one never does."""
        settings = self.settings
        first = max(1, round(self.max_epoch * (1 - settings.text_share)))
        return bool(settings.form == "VT" and self.epoch >= first)

    def parse_batch_train(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the features of all views of a batch [B, V, E], and labels [B]; without "index" those of one view."""
        features, labels = super().parse_batch_train(batch)
        if "index" not in batch:
            return features[:, None], labels
        views = self.train_features.all().values[:, batch["index"]]  # a copy
        views[self.epoch % len(views)] = features
        return views.transpose(0, 1), labels

    def run(self, inputs: Tensor, labels: Tensor) -> Outputs:
        """Return what the loss of this epoch needs, for features [B, V, E]."""
        learner, texts = self.network.learner, self.trains_texts()
        with torch.set_grad_enabled(texts):
            logits = learner(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
        return Outputs(logits, None if texts else learner.mapped(inputs))

    def loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Return the contrastive loss, or the cross-entropy where texts are trained."""
        every = labels.repeat_interleave(outputs.logits.shape[1])
        if outputs.mapped is None:
            return {"loss_ce": F.cross_entropy(outputs.logits.flatten(0, 1), every)}
        return {"loss_con": supervised_contrast(outputs.mapped.flatten(0, 1), every, self.settings.temperature)}

    def shown_logits(self, outputs: Outputs) -> Tensor:
        """Return the logits [B, C] of the first view."""
        return outputs.logits[:, 0]

    def choose(self) -> None:
        """Search alpha and beta on validation images, of equals the least beta, then alpha; without any, they stay."""
        learner, settings, known = self.network.learner, self.settings, self.validation_features()
        if isinstance(known, str):
            chosen = {"beta": settings.beta, "alpha": settings.alpha}
            self.note(chosen, f"TRAINER.DAC.BETA, .ALPHA ({known})", 0)
        else:
            features, labels = known
            axes = zip(settings.search_scale, settings.search_step, strict=True)
            betas, alphas = (Axis(START, float(end), steps).values() for end, steps in axes)
            text_logits, affinity = learner.parts(features)
            every = torch.ones_like(learner.key_labels, dtype=affinity.dtype)[None]
            accuracy = cache_accuracy(text_logits, affinity, learner.key_labels, labels, betas, alphas, every)
            place = best_place(accuracy)
            chosen = {"beta": betas[place[0]], "alpha": alphas[place[1]]}
            self.write_scalar(f"val/{self.main_head}_at_choice", float(accuracy.max()), self.epoch)
            self.note(chosen, "val", len(labels))
        for name, value in chosen.items():
            getattr(learner, name).fill_(value)

"""Linear probe: logistic regression on the frozen CLIP's image features.

As in Radford et al., 2021, it is fitted by L-BFGS, and a binary search on validation images finds the strength of the
regularization. The search is that of CoOp's comparison, on features as CLIP gives them, not normalized. Alternatively,
a linear classifier starts as the zero-shot weights and is trained by gradient descent with CLIP's temperature.

Legend: N training images, n validation images, B images in a batch, C classes, E width of the joint embedding.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import CorrectedKeys, FeatureLearner, FeatureTrainer, MethodConfig, kept_views, key
from .base.search import best_place
from .clip import CLIP
from .features import FeatureSet, ImageEncoder

logger = logging.getLogger(__name__)

COARSE = (1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6)
STEPS = 8


class Linear(NamedTuple):
    """A linear classifier, whose logits are features @ weight.T + bias."""

    weight: Tensor  # [C, E]
    bias: Tensor  # [C]


def fit_logistic(
    features: Tensor, labels: Tensor, num_classes: int, c: float, max_iter: int = 1000, balanced: bool = False
) -> Linear:
    """Fit a multinomial logistic regression by L-BFGS with an L2 penalty of weight 1 / c.

    Args:
        features: [N, E].
        labels: [N], each of 0..C-1 at least once.
        num_classes: C.
        c: inverse strength of the penalty.
        max_iter: iterations at most.
        balanced: whether each class counts the same, however many images it has.

    Raises:
        ValueError: a class has no image.
    """
    missing = set(range(num_classes)) - set(labels.tolist())
    if missing:
        raise ValueError(f"Expected training images of all {num_classes} classes but got none of {sorted(missing)[:5]}")
    if num_classes == 1:
        return Linear(features.new_zeros(1, features.shape[1]), features.new_zeros(1))
    # Here, not above: scikit-learn is slow to import, and every program imports every method.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, solver="lbfgs", max_iter=max_iter, class_weight="balanced" if balanced else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the search also tries penalties too weak to converge
        model.fit(features.cpu().numpy(), labels.cpu().numpy())
    weight, bias = (torch.as_tensor(np.asarray(x), dtype=torch.float32) for x in (model.coef_, model.intercept_))
    if num_classes == 2:  # one row, for the second class
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
    return Linear(weight.to(features.device), bias.to(features.device))


def binary_search(accuracy: Callable[[float], float]) -> float:
    """Return the C that CoOp's binary search ends at.

    The search takes the best of seven powers of ten. Then eight times it halves the interval, at first from a tenth of
    the best to ten times the best: the better end of each interval stays, the left one in a tie.

    Args:
        accuracy: C -> the accuracy of a probe with that C on validation images.
    """
    (place,) = best_place(torch.tensor([accuracy(c) for c in COARSE]))
    peak = COARSE[place]
    left, right = 0.1 * peak, 10.0 * peak
    best = peak
    for _ in range(STEPS):
        middle = math.sqrt(left * right)
        if accuracy(left) < accuracy(right):
            best, left = right, middle
        else:
            best, right = left, middle
    return best


class ProbeLearner(FeatureLearner):
    """A linear classifier.

    Args:
        trained: True: the classifier starts as the zero-shot weights, without a bias and with CLIP's temperature, and
            is trained; False: it starts as zeros with a bias, and is fitted.
        raw: whether features come, and are classified, as CLIP gives them. A loaded checkpoint of unit-length features
            still classifies unit-length features; a checkpoint that does not name its features is such a one.
    """

    CLASS_ROWS: tuple[str, ...] = ("weight",)

    weight: Tensor  # [C, E]

    def __init__(
        self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, *, trained: bool, raw: bool = False
    ) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.trained = trained
        self.raw = raw
        self.facts["features"] = "raw" if raw else "unit"
        if trained:
            self.weight = nn.Parameter(zeroshot.clone())
        else:
            self.CLASS_ROWS = ("weight", "bias")
            self.register_buffer("weight", torch.zeros_like(zeroshot))
            self.register_buffer("bias", torch.zeros(len(zeroshot)))

    def adopt(self, facts: Mapping[str, Any]) -> None:
        """Take over a checkpoint's unit length: raw features can be normalized, but unit ones not made raw."""
        if self.raw and facts.get("features", "unit") == "unit":
            logger.info("The checkpoint classifies features of unit length, which counts")
            self.facts["features"] = "unit"

    def original(self, features: Tensor) -> Tensor:
        """Return CLIP's features at unit length; see FeatureLearner."""
        features = super().original(features)
        return F.normalize(features, dim=-1) if self.raw else features

    def compared(self, features: Tensor) -> Tensor:
        """Return the features that are classified; see FeatureLearner."""
        features = super().compared(features)
        return F.normalize(features, dim=-1) if self.raw and self.facts["features"] == "unit" else features

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E]."""
        images = self.compared(features)
        if self.trained:
            return self.scale * images @ self.weight.t()
        return images @ self.weight.t() + self.get_buffer("bias")


@dataclass(frozen=True)
class LinearProbeConfig(MethodConfig):
    """Settings of the linear probe."""

    views: int = kept_views(0)
    init: str = key(
        "zeros",
        "zeros: logistic regression by L-BFGS; text: start at the zero-shot weights, trained with CLIP's temperature "
        "by the optimizer of OPTIM",
        choices=("zeros", "text"),
    )
    features: str = key(
        "raw",
        "what is fitted (zeros): features as CLIP gives them, or of length 1 (unit); those that MODEL.IMO_WEIGHTS "
        "corrects, and those of INIT text, have unit length",
        choices=("raw", "unit"),
        source="raw",
    )
    c: float = key(
        0.316,
        "inverse strength of the penalty (zeros), where there are no validation images to search on; for unit features "
        "31.6 is its equal",
        above=0,
        source="0.316, for features of length about 10",
    )
    max_iter: int = key(1000, "iterations of L-BFGS (zeros)", low=1, source="1000")


@TRAINER_REGISTRY.register()
class LinearProbe(FeatureTrainer):
    """Logistic regression on image features, or the zero-shot weights trained further."""

    recipe = 2
    node_name = "LINEARPROBE"
    paper = "Radford et al. 2021"
    learns = "a linear classifier on image features"
    cross_entropy = False
    weighs_classes = True
    config = LinearProbeConfig
    extra_keys = {"MODEL": CorrectedKeys}
    model_name = "probe"
    main_head = "probe"
    of_each_class = "weights"
    adapters = "optional"
    drop_last = False  # concerns INIT text, which is ours, not the source's
    eps = 1e-4

    def build_learner(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> FeatureLearner:
        """Build the linear classifier."""
        learner = ProbeLearner(clip, classnames, zeroshot, trained=self.settings.init == "text", raw=self.raw)
        if not learner.trained:  # L-BFGS fits weights and biases, which are not nn.Parameters
            self.fitted_parameters = learner.weight.numel() + learner.get_buffer("bias").numel()
        return learner

    @property
    def raw(self) -> bool:
        """Say whether features come as CLIP gives them."""
        settings, corrected = self.settings, self.cfg.MODEL.get("IMO_WEIGHTS", "")
        return bool(settings.init == "zeros" and settings.features == "raw" and not corrected)

    def build_encoder(self, clip: CLIP) -> ImageEncoder:
        """Build the encoder of images; see FeatureTrainer."""
        encoder = super().build_encoder(clip)
        return encoder.raw() if self.raw else encoder

    def fit(self, features: FeatureSet) -> dict[str, float]:
        """Choose C on validation images, fit, and return the accuracy (percent) on the training images."""
        learner, known = self.network.learner, self.validation_features()
        x, y = features.flat()
        x, balanced = learner.compared(x), self.cfg.OPTIM.get("CLASS_WEIGHTS", "none") == "balanced"
        fits: dict[float, Linear] = {}

        def fitted(c: float) -> Linear:
            if c not in fits:
                fits[c] = fit_logistic(x, y, len(learner.classnames), c, self.settings.max_iter, balanced)
            return fits[c]

        if isinstance(known, str):
            c, on, n = self.settings.c, f"TRAINER.LINEARPROBE.C ({known})", 0
        else:
            images, labels = learner.compared(known[0]), known[1]

            def accuracy(c: float) -> float:
                weight, bias = fitted(c)
                return float(((images @ weight.t() + bias).argmax(dim=1) == labels).float().mean())

            c, on, n = binary_search(accuracy), "val", len(labels)
        self.note({"C": c}, on, n)
        weight, bias = fitted(c)
        learner.get_buffer("weight").copy_(weight)
        learner.get_buffer("bias").copy_(bias)
        return {"acc": 100.0 * float(((x @ weight.t() + bias).argmax(dim=1) == y).float().mean())}

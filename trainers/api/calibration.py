"""Make probabilities mean what they say, and tell images of no known class apart, by logits of held-out images.

Legend: N images, C classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

RANGE = math.log(50)  # temperatures are between 1/50 and 50
ACCEPTED = 0.95  # share of the images of known classes that a threshold lets pass


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T under which softmax(logits / T) gives the labels the highest likelihood.

    Guo et al., On Calibration of Modern Neural Networks, 2017. log T has a standard normal prior, so that few images,
    all of them right, do not make a classifier certain of everything.

    Args:
        logits: [N, C] of images that the classifier was not trained on. labels: [N].
    """
    if not len(labels):
        return 1.0
    known = logits.double()

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(known / math.exp(log_t), labels, reduction="sum")) + log_t**2 / 2

    return math.exp(float(minimize_scalar(loss, bounds=(-RANGE, RANGE), method="bounded").x))


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Return the expected calibration error in percent (15 bins), for probabilities [N, C] and labels [N]."""
    return 100 * float(multiclass_calibration_error(probabilities.float(), labels, probabilities.shape[1], n_bins=15))


def calibrated_apart(logits: Tensor, labels: Tensor, folds: Tensor) -> Tensor:
    """Return probabilities [N, C], each fold's under the temperature of the other folds.

    Args:
        logits: [N, C]. labels, folds: [N].
    """
    out = torch.zeros_like(logits)
    for fold in folds.unique().tolist():
        here = folds == fold
        out[here] = (logits[here] / fit_temperature(logits[~here], labels[~here])).softmax(dim=1)
    return out


class UnknownRule(NamedTuple):
    """The rule by which an image counts as one of no known class: its highest probability is below the threshold.

    Attributes:
        threshold: between 0 and 1.
        auroc: how well the highest probability tells images of known and of left-out classes apart, in percent.
        fpr95: share of left-out classes' images that pass where 95 % of the known ones do, in percent.
    """

    threshold: float
    auroc: float
    fpr95: float


def unknown_rule(known: Tensor, unknown: Tensor) -> UnknownRule:
    """Return the rule that lets 95 % of the images of known classes pass.

    Args:
        known: [N], the highest probability of held-out images of known classes.
        unknown: the same of images whose class was left out of training.
    """
    threshold = float(np.quantile(known.numpy(), 1 - ACCEPTED, method="lower"))
    truth = np.concatenate([np.ones(len(known)), np.zeros(len(unknown))])
    auroc = 100 * float(roc_auc_score(truth, torch.cat([known, unknown]).numpy()))
    return UnknownRule(threshold, auroc, 100 * float((unknown >= threshold).float().mean()))

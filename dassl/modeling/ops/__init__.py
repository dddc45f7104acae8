"""Small operations that semi-supervised trainers share; upstream's layers for domain adaptation are not here."""

from .cross_entropy import cross_entropy
from .mixup import mixup
from .reverse_grad import ReverseGrad
from .utils import (
    create_onehot,
    ema_model_update,
    linear_rampup,
    reverse_index,
    sharpen_prob,
    shuffle_index,
    sigmoid_rampup,
)

__all__ = [
    "ReverseGrad",
    "create_onehot",
    "cross_entropy",
    "ema_model_update",
    "linear_rampup",
    "mixup",
    "reverse_index",
    "sharpen_prob",
    "shuffle_index",
    "sigmoid_rampup",
]

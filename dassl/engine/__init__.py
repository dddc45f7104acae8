"""The training engine: a short loop, hooks for what cuts across methods, and the trainer classes methods build on."""

from .build import TRAINER_REGISTRY, build_trainer
from .hooks import HookBase, build_hooks
from .precision import Precision
from .trainer import SimpleNet, SimpleTrainer, TrainerBase, TrainerX, TrainerXU

__all__ = [
    "TRAINER_REGISTRY",
    "HookBase",
    "Precision",
    "SimpleNet",
    "SimpleTrainer",
    "TrainerBase",
    "TrainerX",
    "TrainerXU",
    "build_hooks",
    "build_trainer",
]

"""Optimizers and learning-rate schedules by name."""

from .lr_scheduler import ClosedFormLR, StepwiseLR, build_lr_scheduler
from .optimizer import build_optimizer

__all__ = ["ClosedFormLR", "StepwiseLR", "build_lr_scheduler", "build_optimizer"]

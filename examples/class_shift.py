"""A method on frozen features in forty lines: move each class weight of zero-shot CLIP, but not far.

python examples/class_shift.py --trainer ClassShift --config-file examples/class_shift.yaml
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout; not needed once installed

from dassl.engine import TRAINER_REGISTRY
from trainers.app.train import main
from trainers.base import FeatureLearner, FeatureTrainer, MethodConfig, kept_views, key


@dataclass(frozen=True)
class ClassShiftConfig(MethodConfig):
    """Settings: TRAINER.CLASSSHIFT.VIEWS and TRAINER.CLASSSHIFT.PULL."""

    views: int = kept_views(10)
    pull: float = key(1.0, "weight of the penalty on the length of a shift", low=0)


class ClassShiftLearner(FeatureLearner):
    """Hold a shift for each class; CLASS_ROWS has its rows follow the classes of a dataset."""

    CLASS_ROWS = ("shift",)

    def __init__(self, clip, classnames, zeroshot):
        super().__init__(clip, classnames, zeroshot)
        self.shift = nn.Parameter(torch.zeros_like(zeroshot))  # [C, E]

    def forward(self, features):
        """Return logits [B, C] for features [B, E]."""
        return self.scale * features @ F.normalize(self.zeroshot + self.shift, dim=-1).t()


@TRAINER_REGISTRY.register()
class ClassShift(FeatureTrainer):
    """Train the shifts; images are encoded once, and evaluation, checkpoints and reports come from the base."""

    config = ClassShiftConfig
    of_each_class = "weights"

    def build_learner(self, clip, classnames, zeroshot):
        """Return what is trained and saved."""
        return ClassShiftLearner(clip, classnames, zeroshot)

    def loss(self, outputs, labels):
        """Return the named losses of a step."""
        learner: Any = self.network.learner
        penalty = learner.shift.square().sum(dim=1).mean()
        return {"ce": F.cross_entropy(outputs, labels), "pull": self.settings.pull * penalty}


if __name__ == "__main__":
    sys.exit(main())

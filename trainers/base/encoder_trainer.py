"""Train what sits inside CLIP's encoders: prompts, adapters, low-rank updates."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dassl.optim import build_lr_scheduler, build_optimizer

from ..clip import CLIP, tell_alike
from .learner import Classifier
from .schedule import count_steps
from .views_trainer import ViewsTrainer

logger = logging.getLogger(__name__)


class EncoderTrainer(ViewsTrainer):
    """Train a `Classifier` by cross-entropy; a subclass says which classifier, and declares the configuration.

    What of the image tower is frozen is said by `Classifier.first_adapted`: with INPUT.VIEWS, it is computed once.

    The learning-rate schedule counts epochs, as CoOp's does, unless `per_step` is set.
    """

    network: Classifier

    # Configuration

    @classmethod
    def needs_blocks(cls, cfg: Any) -> str:
        """Say that the method learns within the encoders; see BlocksNeeded."""
        return "learns within the encoders"

    # Building

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> Classifier:
        """Build the classifier to train."""
        raise NotImplementedError

    def build_model(self) -> None:
        """Build CLIP, the classifier around it, and the optimizer and schedule of its learner."""
        clip, classnames = self.load_frozen_clip(self.settings.prec)
        self.network = self.build_network(clip, classnames, self.templates())
        tell_alike(clip, classnames, self.network.zeroshot)
        learner = self.network.learner
        self.tell_size(learner)
        optim = self.build_optimizer(learner)
        self.register_model(self.model_name, learner, optim, self.build_schedule(optim))
        self.keep_views()

    def build_optimizer(self, learner: Any) -> Any:
        """Build the optimizer of the learner's parameters."""
        return build_optimizer(learner, self.cfg.OPTIM)

    def build_schedule(self, optim: Any) -> Any:
        """Build the learning-rate schedule."""
        node = self.cfg.OPTIM
        return build_lr_scheduler(optim, count_steps(node, len(self.train_loader_x)) if self.per_step else node)

    # Training

    def step_seed(self, step: int) -> int:
        """Return a seed that follows from the run's seed and a step alone, so that a resumed run draws the same."""
        seed = self.cfg.SEED if self.cfg.SEED >= 0 else torch.initial_seed()
        return (1_000_003 * seed + step) % 2**63

    # Evaluation

    @torch.no_grad()
    def model_heads(self, input: Tensor) -> dict[str, Tensor]:
        """Return the logits [B, C] of zero-shot CLIP and of the method for images [B, 3, H, W]."""
        with self._autocast():
            clip_logits, logits = self.network.both(input)
        return {self.reference_head: clip_logits, self.main_head: logits}

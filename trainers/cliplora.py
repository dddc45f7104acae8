"""CLIP-LoRA: low-rank updates of the query, key and value projections of every block of both encoders.

Zanella and Ben Ayed, Low-Rank Few-Shot Adaptation of Vision-Language Models, 2024. One recipe for all datasets: rank 2,
500 x shots steps, the dataset's prompt, no validation set. The weights of CLIP are not touched: to each projection of a
block's tokens x,  alpha / sqrt(r) * B A dropout(x)  is added.

Legend: B images, C classes, D width of a block, r rank.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import Classifier, CountedTrainer, Learner, MethodConfig, key, precision
from .clip import CLIP, fill_template
from .features import FrozenPart
from .modules.low_rank import LowRankUpdates
from .modules.peft_files import is_peft, read_peft

logger = logging.getLogger(__name__)


class LoRALearner(Learner):
    """The low-rank updates of both encoders: `visual` and `text`, each by block and by projection.

    Args:
        clip: the frozen CLIP.
        classnames: class names in the order of their labels.
        settings: see CLIPLoRAConfig.

    Raises:
        ValueError: the image encoder is a ResNet.
    """

    def __init__(self, clip: CLIP, classnames: Sequence[str], settings: CLIPLoRAConfig) -> None:
        facts = {"backbone": clip.name, "weights_digest": clip.weights_digest, "alpha": settings.alpha}
        super().__init__(classnames, facts)

        update = settings.rank, settings.alpha, settings.dropout
        self.dropout = settings.dropout
        self.visual, self.text = LowRankUpdates(clip.visual.widths, *update), LowRankUpdates(clip.text.widths, *update)
        clip.visual.check_edits([self.visual], "CLIPLoRA")

    @property
    def towers(self) -> dict[str, LowRankUpdates]:
        """The updates of each encoder."""
        return {"visual": self.visual, "text": self.text}

    def seed_dropout(self, seed: int, device: torch.device) -> None:
        """Seed the dropout: from now on, `seed` alone decides what is dropped."""
        generator = self.visual.generator
        if generator is None:
            generator = self.visual.generator = self.text.generator = torch.Generator(device)
        generator.manual_seed(seed)


class LoRAClassifier(Classifier):
    """CLIP with low-rank updates.

    Args:
        clip, classnames, learner: see Classifier.
        templates: those of the zero-shot reference; the first is the prompt that is trained with.
    """

    learner: LoRALearner
    first_adapted = 1

    def __init__(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str], learner: LoRALearner) -> None:
        super().__init__(clip, classnames, templates, learner)
        self._tokens = clip.text.tokenise([fill_template(templates[0], name) for name in classnames])

    def compute_text(self) -> Tensor:
        """Return the updated encoder's text features [C, E], normalized, fp32."""
        text, learner, tokens = self.clip.text, self.learner, self._tokens
        if learner.training and learner.dropout > 0:
            # Each prompt drops entries of its own, also of the tokens that all prompts begin with: nothing is shared.
            tokens = dataclasses.replace(tokens, shared=0)
        features = text.suffix(text.prefix(tokens, 0), 1, [learner.text])
        return F.normalize(features.float(), dim=-1)

    def classify(self, part: FrozenPart) -> Tensor:
        """Return logits [B, C] for what enters the first block."""
        assert part.hidden is not None
        features = self.clip.visual.suffix(part.hidden, 1, [self.learner.visual])
        return self.logits(features, self.text_features())


@dataclass(frozen=True)
class CLIPLoRAConfig(MethodConfig):
    """Settings of CLIP-LoRA; defaults as published."""

    rank: int = key(2, "rank of each update", low=1)
    alpha: float = key(1.0, "scale of each update times the root of its rank", above=0)
    dropout: float = key(0.25, "share of the updates' inputs that are dropped in training", low=0, high=0.99)
    n_iters: int = key(500, "steps per shot (DATASET.NUM_SHOTS), in place of OPTIM.MAX_EPOCH, which 0 keeps", low=0)
    lr_min: float = key(1e-6, "rate at which a cosine schedule without warm-up ends", low=0, high=1)
    prec: str = precision("amp", "the updates are in fp32")


@TRAINER_REGISTRY.register()
class CLIPLoRA(CountedTrainer):
    """Low-rank few-shot adaptation. Training is counted in steps, whose number gives that of epochs."""

    recipe = 2
    node_name = "CLIPLORA"
    paper = "Zanella and Ben Ayed 2024"
    learns = "low-rank updates of both encoders"
    config = CLIPLoRAConfig
    extra_keys = {}
    no_views = "whose updates begin in the first block of the image tower"
    model_name = "lora"
    main_head = "lora"
    network: LoRAClassifier

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> LoRAClassifier:
        """Build CLIP with low-rank updates."""
        return LoRAClassifier(clip, classnames, templates, LoRALearner(clip, classnames, self.settings))

    def load_model(self, directory: str | os.PathLike[str], epoch: int | None = None) -> None:
        """Load what an earlier run learnt, or an adapter of Hugging Face's CLIPModel in PEFT's format.

        Args:
            directory: output folder of the run, or the adapter's folder; empty: nothing is loaded.
            epoch: see LearnerTrainer; an adapter has no epochs.

        Raises:
            FileNotFoundError, ValueError: see LearnerTrainer and `read_peft`.
        """
        if not directory or not is_peft(directory):
            super().load_model(directory, epoch)
            return
        learner = self.network.learner
        learner.take(read_peft(directory, learner.towers))
        logger.info("Loaded the adapter %s", directory)

    def build_schedule(self, optim: Any) -> Any:
        """Build the schedule per step, and settle the number of steps and, with it, that of epochs."""
        self.count_stages()
        if self.cfg.OPTIM.LR_SCHEDULER != "cosine" or self.cfg.OPTIM.WARMUP_EPOCH > 0:
            return super().build_schedule(optim)
        lowest = self.settings.lr_min
        return torch.optim.lr_scheduler.CosineAnnealingLR(optim, max(1, self.total_steps), eta_min=lowest)

    def before_step(self, step: int) -> None:
        """Seed the dropout of a step.

        The seed follows from the step, not from what was drawn before it: a resumed run drops what an uninterrupted
        one does.
        """
        rank = 0 if self.share is None else self.share.rank  # each process drops entries of its own images
        self.network.learner.seed_dropout(self.step_seed(step + (rank << 48)), self.device)

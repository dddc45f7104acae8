"""A prompt learner in forty lines: CoOp's context vectors, kept near the text features of zero-shot CLIP.

python examples/near_prompts.py --trainer NearPrompts --config-file examples/near_prompts.yaml
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout; not needed once installed

from dassl.engine import TRAINER_REGISTRY
from trainers.app.train import main
from trainers.base import Classifier, EncoderTrainer, Learner, MethodConfig, key
from trainers.modules.context_prompts import ContextPrompts, word_vectors


@dataclass(frozen=True)
class NearPromptsConfig(MethodConfig):
    """Settings: TRAINER.NEARPROMPTS.WORDS and TRAINER.NEARPROMPTS.PULL."""

    words: str = key("a photo of a", "words that the context starts as", words=True)
    pull: float = key(8.0, "weight of the distance to zero-shot text features", low=0)


class NearPromptsLearner(Learner):
    """Hold the context vectors; the facts say which CLIP a checkpoint is for."""

    def __init__(self, clip, classnames, words):
        super().__init__(classnames, {"backbone": clip.name, "weights_digest": clip.weights_digest})
        self.context = nn.Parameter(word_vectors(clip.text, words))  # [n, D]
        self.prompts = ContextPrompts(clip.text, classnames, len(self.context), words)


class NearPromptsClassifier(Classifier):
    """Classify images by learnt prompts; `text_features` keeps them while nothing is learnt."""

    learner: NearPromptsLearner

    def compute_text(self):
        """Return the text features [C, E] of the prompts."""
        state = self.learner.prompts.state(self.clip.text, self.learner.context)
        return F.normalize(self.clip.text.suffix(state, 1).float(), dim=-1)

    def classify(self, part):
        """Return logits [B, C] for what is frozen of the images: here their features [B, E]."""
        return self.logits(part.features, self.text_features())


@TRAINER_REGISTRY.register()
class NearPrompts(EncoderTrainer):
    """Train the context; precision, steps, evaluation, checkpoints and reports come from the base."""

    config = NearPromptsConfig

    def build_network(self, clip, classnames, templates):
        """Return the classifier that is trained."""
        learner = NearPromptsLearner(clip, classnames, self.settings.words)
        return NearPromptsClassifier(clip, classnames, templates, learner)

    def loss(self, outputs, labels):
        """Return the named losses of a step; for brevity, the prompts are encoded a second time here."""
        distance = 1 - (self.network.text_features() * self.network.zeroshot).sum(dim=-1).mean()
        return {"ce": F.cross_entropy(outputs, labels), "near": self.settings.pull * distance}


if __name__ == "__main__":
    sys.exit(main())

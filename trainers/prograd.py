"""ProGrad: CoOp whose steps do not go against what zero-shot CLIP says of the images.

Zhu et al., Prompt-aligned Gradient for Prompt Tuning, 2023 (equation 4). With g the gradient of cross-entropy and h
that of the divergence KL from zero-shot CLIP's probabilities to those of the learnt prompts, each parameter tensor's
step is made on

    g                                   where g . h >= 0
    g - LAMBDA (g . h / |h|^2) h        elsewhere

What prompt methods share is in base/prompts.py. Legend: B images, C classes, n context vectors, D width of the text
encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY

from .base import (
    MethodConfig,
    PromptClassifier,
    PromptLearner,
    PromptOutputs,
    PromptTrainer,
    initial_context,
    key,
    precision,
)
from .clip import CLIP


def words_before_the_name(template: str) -> str:
    """Return what a template has before the class name: "a photo of a {}, a type of pet." -> "a photo of a"."""
    return template.partition("{}")[0].strip()


def padded_context(clip: CLIP, n_ctx: int, words: str) -> tuple[Tensor, str]:
    """Return context vectors [n, D] that are zero but for the last ones, the embeddings of `words`; and their text.

    Raises:
        ValueError: there are more tokens than n.
    """
    vectors, words = initial_context(clip, 1, words)
    free = n_ctx - len(vectors)
    if free < 0:
        raise ValueError(
            f"Expected TRAINER.PROGRAD.N_CTX to be at least {len(vectors)}, the number of tokens of {words!r}, "
            f"but got {n_ctx}"
        )
    context = torch.cat([torch.zeros(free, vectors.shape[1], device=vectors.device), vectors])
    return context, " ".join([*["X"] * free, words])


def without_conflict(g: Tensor, h: Tensor, share: float = 1.0) -> Tensor:
    """Return the gradient g without `share` of its part along h where the two conflict, else g; shapes are the same.

    No number is read, so that a GPU need not be waited for.
    """
    product = (g * h).sum()
    along = torch.where(product < 0, product / (h * h).sum(), torch.zeros_like(product))
    return g - share * along * h


@dataclass(frozen=True)
class ProGradConfig(MethodConfig):
    """Settings of ProGrad; defaults as published."""

    n_ctx: int = key(16, "number of context vectors", low=1)
    from_template: bool = key(
        True,
        "the last vectors start as the words that the dataset's template has before the class name, those before them "
        "as zeros; off: all start at random",
    )
    lambda_: float = key(1.0, "how much is taken of a step's part against zero-shot CLIP", low=0, source="1; 0.8 on "
                         "Flowers102, DTD and EuroSAT with 8 and 16 shots")  # fmt: skip
    t: float = key(1.0, "temperature of the divergence", above=0)
    prec: str = precision("fp16", "the context is kept in fp32")


@TRAINER_REGISTRY.register()
class ProGrad(PromptTrainer):
    """Prompt-aligned gradient."""

    paper = "Zhu et al. 2023"
    learns = "context vectors of the prompts"
    config = ProGradConfig

    def build_network(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> PromptClassifier:
        """Build CLIP with a prompt learner."""
        settings, words = self.settings, words_before_the_name(templates[0])
        if settings.from_template and words:
            context, words = padded_context(clip, settings.n_ctx, words)
        else:
            context, words = initial_context(clip, settings.n_ctx)
        return PromptClassifier(clip, classnames, templates, PromptLearner(clip, classnames, context, words))

    def run(self, inputs: Tensor, labels: Tensor) -> PromptOutputs:
        """Compute a step's outputs, and the divergence from zero-shot CLIP."""
        outputs, t = super().run(inputs, labels), self.settings.t
        with torch.no_grad():
            wanted = torch.softmax(self.network.logits(outputs.features, self.network.zeroshot) / t, dim=1)
        # KL without the entropy of `wanted`, which has no gradient; this is what the source calls KL.
        self._kl = -t * t * (wanted * F.log_softmax(outputs.logits / t, dim=1)).sum(dim=1).mean()
        return outputs

    def watch(self, outputs: PromptOutputs) -> dict[str, Tensor]:
        """Return the cross-entropy to zero-shot CLIP's probabilities, whose gradient a step does not go against."""
        return {"kl": self._kl.detach()}

    def model_backward(self, loss: Tensor) -> bool:
        """Back-propagate the divergence, then the loss, and take from the loss's gradients what conflicts.

        Both are gradients of the whole batch, also where processes share it.
        """
        learnt = [p for p in self.network.learner.parameters() if p.requires_grad]
        for p, gradient in zip(
            learnt, torch.autograd.grad(self._scale(self._kl), learnt, retain_graph=True), strict=True
        ):
            p.grad = gradient
        self.average_gradients()
        general = [p.grad for p in learnt]
        self.model_zero_grad()
        if not super().model_backward(loss):
            return False
        self.average_gradients()
        for p, h in zip(learnt, general, strict=True):
            if p.grad is not None and h is not None:
                p.grad = without_conflict(p.grad, h, self.settings.lambda_)
        return True

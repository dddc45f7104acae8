"""A trained method as one module: images in, probabilities out.

Legend: B images, C classes, L tokens of a prompt, n context vectors, D width of the text encoder, E joint embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dassl.evaluation.passes import as_heads

from ...app.prediction import main_head
from ...clip.text import TextState
from ...cocoop import CoCoOpClassifier


class Exported(nn.Module):
    """Classify images by the main head of a trained method, in fp32.

    What a method computes of texts and training images becomes a constant of the exported file, as does everything else
    that does not depend on the image. The trainer is held outside of torch's modules, so that tracing leaves it alone.

    Args:
        trainer: a trained method on the CPU, ready to classify.
        temperature: what logits are divided by.
        pixels: mean and standard deviation of each channel, where the input is to be pixels; None: the input is
            normalized already.
    """

    def __init__(
        self, trainer: Any, temperature: float = 1.0, pixels: tuple[Sequence[float], Sequence[float]] | None = None
    ) -> None:
        super().__init__()
        self._trainer = (trainer,)
        self.temperature = temperature
        self.pixels = None
        if pixels is not None:
            mean, std = (torch.tensor(tuple(values)).view(1, 3, 1, 1) for values in pixels)
            self.pixels = mean, std
        for model in (getattr(trainer, "network", None), *trainer._models.values()):
            if isinstance(model, nn.Module):
                model.requires_grad_(False)  # a tensor with a gradient cannot be a constant of a trace

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities [B, C].

        Args:
            images: normalized images [B, 3, H, W], fp32; or pixels [B, H, W, 3], uint8.
        """
        if self.pixels is not None:
            mean, std = self.pixels
            images = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
        (trainer,) = self._trainer
        heads = self._heads(trainer, images)
        logits = heads[main_head(trainer, heads)]
        return (logits.float() / self.temperature).softmax(dim=1)

    def _heads(self, trainer: Any, images: Tensor) -> Mapping[str, Tensor]:
        network = getattr(trainer, "network", None)
        if isinstance(network, CoCoOpClassifier):
            return {trainer.main_head: conditional_logits(network, images)}
        # The number of labels is not that of images, which may be any number in an exported file.
        nothing = torch.zeros(1, dtype=torch.long)
        batch = {"img": images, "label": nothing, "domain": nothing, "impath": [""]}
        input, _ = trainer.parse_batch_test(batch)
        with trainer.precision.autocast():
            return as_heads(trainer.model_heads(input))


def conditional_logits(network: CoCoOpClassifier, images: Tensor) -> Tensor:
    """Return CoCoOp's logits [B, C], for all images at once.

    The method itself goes through the images one by one, and a loop's length would be a constant of the exported file.
    """
    text, prompts = network.clip.text, network.learner.prompts
    features = F.normalize(network.clip.encode_image(images).float(), dim=-1)
    contexts = network.learner.contexts(features).to(prompts.prefix.dtype)  # [B, n, D]
    number, classes = features.shape[0], prompts.prefix.shape[0]
    x = torch.cat(
        [
            prompts.prefix.expand(number, -1, -1, -1),
            contexts.unsqueeze(1).expand(-1, classes, -1, -1),
            prompts.suffix.expand(number, -1, -1, -1),
        ],
        dim=2,
    )  # [B, C, L, D]
    if prompts.before < prompts.n_ctx:
        x = x.gather(2, prompts.order.unsqueeze(-1).expand_as(x))
    x = (x + text.positional_embedding[: x.shape[2]].to(x.dtype)).flatten(0, 1)
    # The start of text is the one token that all prompts share.
    state = TextState(x[:1, :1], x[:, 1:], prompts.eot.repeat(number) - 1, next_block=1)
    texts = F.normalize(text.suffix(state, 1).float(), dim=-1).unflatten(0, (-1, classes))  # [B, C, E]
    return network.clip.logit_scale * (texts @ features.unsqueeze(-1)).squeeze(-1)

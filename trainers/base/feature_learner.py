"""Learn or fit a classifier on features of the frozen CLIP.

Legend: B images, N training images, C classes, E width of the joint embedding. Features are L2-normalized, fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clip import CLIP
from ..features.encoder import ImageEncoder
from .learner import Learner, Peek, class_rows


class FeatureLearner(Learner):
    """Classify features: a subclass says how features [B, E] give logits [B, C].

    Args:
        clip: the frozen CLIP.
        classnames: class names in the order of their labels.
        zeroshot: zero-shot weights [C, E], normalized.
    """

    CLASS_ROWS: tuple[str, ...] = ()  # names in a checkpoint that have a row per class
    SAMPLES: tuple[str, ...] = ()  # names that have a row per training image; the first one is their labels

    zeroshot: Tensor
    prepared: Tensor  # whether FeatureTrainer.prepare has computed what follows from the training images

    def __init__(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor) -> None:
        super().__init__(classnames, {"backbone": clip.name, "weights_digest": clip.weights_digest})
        self.scale = clip.logit_scale
        self.register_buffer("zeroshot", zeroshot.detach().float().clone(), persistent=False)
        self.register_buffer("prepared", torch.tensor(False))
        self.peek = Peek()

    def keep_number(self, name: str, value: float) -> None:
        """Keep a number in the state, in fp64, so that 0.54 stays 0.54."""
        self.register_buffer(name, torch.tensor(value, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E]; here those of zero-shot CLIP."""
        return self.clip_logits(features)

    def clip_logits(self, features: Tensor) -> Tensor:
        """Return zero-shot logits [B, C] for features [B, E] or [B, 2E]."""
        return self.scale * self.original(features) @ self.zeroshot.t()

    def original(self, features: Tensor) -> Tensor:
        """Return the features that CLIP gives, [..., E], from [..., E] or, with corrected ones beside, [..., 2E]."""
        return features[..., : self.zeroshot.shape[1]]

    def compared(self, features: Tensor) -> Tensor:
        """Return the features [..., E] to compare images by, from [..., E] or [..., 2E]: the corrected ones, if any."""
        return features[..., -self.zeroshot.shape[1] :]

    def for_classes(
        self, state: dict[str, Tensor], trained: Sequence[str] | None, indices: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """Return `state` with the rows and training images of the present classes only.

        Raises:
            ValueError: a present class is not among those trained on (see `class_rows`).
        """
        if trained is not None and (self.CLASS_ROWS or self.SAMPLES):
            rows = class_rows(self.classnames, trained, indices, "weights or images")
            state = {**state, **{name: state[name][rows] for name in self.CLASS_ROWS}}
            if self.SAMPLES and rows != list(range(len(trained))):
                labels = state[self.SAMPLES[0]]
                position = torch.full((len(trained),), -1, dtype=labels.dtype, device=labels.device)
                position[rows] = torch.arange(len(rows), dtype=labels.dtype, device=labels.device)
                kept = position[labels] >= 0
                state = {**state, **{name: state[name][kept] for name in self.SAMPLES}}
                state[self.SAMPLES[0]] = position[labels[kept]]
        for name in self.SAMPLES:  # the number of samples follows the checkpoint
            own: Tensor = getattr(self, name)
            own.data = torch.empty_like(state[name], device=own.device)
        return state


class CacheLearner(FeatureLearner):
    """Hold a cache of training images: the labels of its N keys, its weight alpha and its sharpness beta.

    A subclass has the keys and says how they are compared with an image.

    Args:
        clip, classnames, zeroshot: see FeatureLearner.
        n: number of keys, N.
        alpha, beta: values until others are chosen.
    """

    SAMPLES: tuple[str, ...] = ("key_labels", "keys")

    keys: Tensor
    key_labels: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(
        self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, *, n: int, alpha: float, beta: float
    ) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.register_buffer("key_labels", torch.zeros(n, dtype=torch.long))
        self.keep_number("alpha", alpha)
        self.keep_number("beta", beta)


class PooledLearner(FeatureLearner):
    """Classify features before CLIP's last projection, [B, P], with their lengths; see ImageEncoder.before_projection.

    Args:
        clip, classnames, zeroshot: see FeatureLearner.
        pooled: whether it is given such features at all; if not, CLIP's last matrix is not asked for.
    """

    start: Tensor  # CLIP's last matrix, [P, E]
    bias: Tensor | None  # what is added to the product, [E]

    def __init__(self, clip: CLIP, classnames: Sequence[str], zeroshot: Tensor, pooled: bool = True) -> None:
        super().__init__(clip, classnames, zeroshot)
        self.pooled = pooled
        if not pooled:
            return
        start, bias = clip.visual.projection()
        self.register_buffer("start", start.detach().float().clone(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone(), persistent=False)

    def project(self, features: Tensor) -> Tensor:
        """Return features [B, E], as CLIP gives them, from those before its projection, [B, P]."""
        return F.linear(features, self.start.t(), self.bias)

    def original(self, features: Tensor) -> Tensor:
        """Return CLIP's features [B, E], normalized, from those before its projection, [B, P]."""
        return F.normalize(self.project(features), dim=-1)


class FeatureNetwork(nn.Module):
    """The frozen CLIP and a learner on its features. Both `forward` and `both` take images or features.

    Args:
        encoder: the encoder of images, around a frozen CLIP on its device.
        learner: what is trained or fitted; moved to CLIP's device.
    """

    def __init__(self, encoder: ImageEncoder, learner: FeatureLearner) -> None:
        super().__init__()
        self.encode = encoder
        self.clip = encoder.clip
        self.learner = learner.to(encoder.clip.device)

    def features(self, input: Tensor) -> Tensor:
        """Return features [B, E] for images [B, 3, H, W]; features [B, E] come back as they are."""
        return input if input.ndim == 2 else self.encode(input)

    def forward(self, input: Tensor) -> Tensor:
        """Return the learner's logits [B, C] for images or features, in fp32 even under autocast."""
        features = self.features(input)
        with torch.autocast(device_type=features.device.type, enabled=False):
            return self.learner(features)

    def both(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Return the zero-shot logits and the learner's logits, [B, C] each, for images or features."""
        features = self.features(input)
        with torch.autocast(device_type=features.device.type, enabled=False):
            return self.learner.clip_logits(features), self.learner(features)

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Set the learner's mode; the frozen CLIP stays in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        return self

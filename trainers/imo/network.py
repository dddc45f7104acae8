"""The frozen CLIP with adapters behind its visual blocks, and what trains them: a classifier, or a teacher and heads.

Legend: B images, V crops, C classes, E width of the joint embedding, K outputs of DINO's head.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clip import CLIP
from ..learner import Classifier, Learner
from .adapters import IMOAdapters
from .dino import DINOHead, update_teacher


class AdapterLearner(Learner):
    """The adapters, and beside them what is thrown away after training.

    Args:
        clip: the frozen CLIP.
        classnames: of the generic set.
        dim: bottleneck width.
    """

    def __init__(self, clip: CLIP, classnames: Sequence[str], dim: int) -> None:
        super().__init__(classnames, {"backbone": clip.name, "weights_digest": clip.weights_digest})
        self.adapters = IMOAdapters(clip.visual.widths, dim)

    @property
    def result(self) -> IMOAdapters:
        """The adapters that are saved and evaluated."""
        return self.adapters


class SupervisedLearner(AdapterLearner):
    """Adapters and a linear classifier over the generic set's labels.

    Args:
        clip, classnames, dim: see AdapterLearner.
        scale: of the normalised features that the classifier takes; 0: CLIP's logit scale.
    """

    def __init__(self, clip: CLIP, classnames: Sequence[str], dim: int, scale: float = 0.0) -> None:
        super().__init__(clip, classnames, dim)
        self.scale = scale or clip.logit_scale
        self.classifier = nn.Linear(clip.embed_dim, len(classnames))

    @torch.no_grad()
    def start_from(self, means: Tensor) -> None:
        """Has the classifier start as the mean features [C, E] of the classes, less what all of them have in common."""
        self.classifier.weight.copy_(F.normalize(means - means.mean(dim=0), dim=-1))
        self.classifier.bias.zero_()

    def for_classes(
        self, state: dict[str, Tensor], trained: Sequence[str] | None, indices: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """Everything; for other classes without the classifier, which nothing but training needs."""
        if trained is None or list(trained) == self.classnames:
            return state
        own = {f"classifier.{name}": value for name, value in self.classifier.state_dict().items()}
        return {**state, **own}


class DINOLearner(AdapterLearner):
    """Adapters and projection head of a student and of its teacher, who follows it.

    Args:
        clip, classnames, dim: see AdapterLearner.
        hidden, bottleneck, out: see DINOHead.
        save: "teacher" or "student": whose adapters are the result.
    """

    centre: Tensor  # [K]

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        dim: int,
        *,
        hidden: int,
        bottleneck: int,
        out: int,
        save: str = "teacher",
    ) -> None:
        super().__init__(clip, classnames, dim)
        self.head = DINOHead(clip.embed_dim, hidden=hidden, bottleneck=bottleneck, out=out)
        self.teacher = nn.ModuleDict({"adapters": copy.deepcopy(self.adapters), "head": copy.deepcopy(self.head)})
        self.teacher.requires_grad_(False)
        self.register_buffer("centre", torch.zeros(out))
        self.save = save

    @property
    def result(self) -> IMOAdapters:
        """See AdapterLearner."""
        adapters = self.teacher["adapters"] if self.save == "teacher" else self.adapters
        assert isinstance(adapters, IMOAdapters)
        return adapters

    def follow(self, momentum: float) -> None:
        """Moves the teacher towards the student."""
        update_teacher(self.teacher["adapters"].parameters(), self.adapters.parameters(), momentum)
        update_teacher(self.teacher["head"].parameters(), self.head.parameters(), momentum)


class IMONetwork(Classifier):
    """CLIP with adapters. Zero-shot weights are those of the generic set's class names."""

    learner: AdapterLearner

    def corrected(self, images: Tensor) -> Tensor:
        """Features [B, E] with the adapters that are saved, normalised, fp32."""
        return self.learner.result.encode(self.clip, images)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the classifier's logits [B, C]."""
        learner = self.learner
        assert isinstance(learner, SupervisedLearner)
        features = learner.adapters.encode(self.clip, images)
        with torch.autocast(device_type=features.device.type, enabled=False):
            return learner.classifier(learner.scale * features)

    def student(self, crops: Tensor) -> Tensor:
        """Crops [n, 3, S, S] -> the student's outputs [n, K]."""
        learner = self.learner
        assert isinstance(learner, DINOLearner)
        return learner.head(learner.adapters.encode(self.clip, crops) * self.clip.embed_dim**0.5)

    @torch.no_grad()
    def teacher(self, crops: Tensor) -> Tensor:
        """Crops [n, 3, S, S] -> the teacher's outputs [n, K]."""
        learner = self.learner
        assert isinstance(learner, DINOLearner)
        adapters = learner.teacher["adapters"]
        assert isinstance(adapters, IMOAdapters)
        return learner.teacher["head"](adapters.encode(self.clip, crops) * self.clip.embed_dim**0.5)

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> logits [B, C] of zero-shot CLIP, and of corrected features with the same text."""
        plain = self.logits(self.clip.encode_image(images), self.zeroshot)
        return plain, self.logits(self.corrected(images), self.zeroshot)

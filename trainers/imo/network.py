"""The frozen CLIP with adapters at its visual blocks, and what trains them: a classifier, or a teacher and heads.

Legend: B images, V crops, C classes, E width of the joint embedding, K outputs of DINO's head.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base import Classifier, Learner, pack_record, unpack_record
from ..clip import CLIP
from ..modules.overlap_adapters import Dropout, IMOAdapters
from .dino import DINOHead, update_teacher


class AdapterLearner(Learner):
    """The adapters, and beside them the classifier or head that is thrown away after training.

    A checkpoint says in which form its adapters compute.

    Args:
        clip: the frozen CLIP.
        classnames: class names of the generic set.
        dim: bottleneck width.
        adapters: "form", "scale" and "dropout", see IMOAdapters.
        raw: whether classifier or head takes features as the encoder gives them; else normalized ones, times a scale.
    """

    def __init__(
        self, clip: CLIP, classnames: Sequence[str], dim: int, adapters: Mapping[str, Any], raw: bool = True
    ) -> None:
        super().__init__(classnames, {"backbone": clip.name, "weights_digest": clip.weights_digest})
        self.adapters = IMOAdapters(clip.visual.widths, dim, **adapters)
        self.raw = raw

    @property
    def result(self) -> IMOAdapters:
        """The adapters that are saved and evaluated."""
        return self.adapters

    def trained_input(self, clip: CLIP, adapters: IMOAdapters, images: Tensor, scale: float) -> Tensor:
        """Return what classifier or head takes of images, [B, E]: raw features, or normalized ones times `scale`."""
        features = adapters.encode(clip, images, unit=not self.raw)
        return features if self.raw else scale * features

    def take_form(self, record: Mapping[str, Any]) -> None:
        """Give the adapters the form that a checkpoint's record describes."""
        self.adapters.take_form(record.get("adapters", {}))

    def get_extra_state(self) -> Tensor:
        """Return what Learner packs for a checkpoint, and the form of the adapters."""
        return pack_record({**unpack_record(super().get_extra_state()), "adapters": self.adapters.made_as})

    def set_extra_state(self, state: Tensor) -> None:
        """Take the adapters' form from a checkpoint's record."""
        self.take_form(unpack_record(state))

    def take(self, state: Mapping[str, Tensor], indices: Sequence[int] | None = None) -> None:
        """Load a checkpoint's state, and the form of its adapters; see Learner."""
        packed = state.get("_extra_state")
        self.take_form({} if packed is None else unpack_record(packed))
        super().take(state, indices)


class SupervisedLearner(AdapterLearner):
    """Adapters and a linear classifier over the generic set's labels.

    Args:
        clip, classnames, dim, adapters, raw: see AdapterLearner.
        scale: factor of the normalized features that the classifier takes; 0: CLIP's logit scale.
    """

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        dim: int,
        adapters: Mapping[str, Any],
        raw: bool = True,
        scale: float = 0.0,
    ) -> None:
        super().__init__(clip, classnames, dim, adapters, raw)
        self.scale = scale or clip.logit_scale
        self.classifier = nn.Linear(clip.embed_dim, len(classnames))

    @torch.no_grad()
    def start_from(self, means: Tensor) -> None:
        """Start the classifier as the mean features [C, E] of the classes, less what all of them have in common."""
        self.classifier.weight.copy_(F.normalize(means - means.mean(dim=0), dim=-1))
        self.classifier.bias.zero_()

    def for_classes(
        self, state: dict[str, Tensor], trained: Sequence[str] | None, indices: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """Return all of `state`, for other classes with the present classifier in place of the trained one.

        Nothing but training needs the classifier.
        """
        if trained is None or list(trained) == self.classnames:
            return state
        own = {f"classifier.{name}": value for name, value in self.classifier.state_dict().items()}
        return {**state, **own}


class DINOLearner(AdapterLearner):
    """Adapters and projection head of a student, and those of a teacher, which follow the student's.

    Args:
        clip, classnames, dim, adapters, raw: see AdapterLearner.
        hidden, bottleneck, out: see DINOHead.
        save: "teacher" or "student": whose adapters are the result.
        train_head: whether the student's head is trained; else both heads stay as drawn.
    """

    centre: Tensor  # [K]

    def __init__(
        self,
        clip: CLIP,
        classnames: Sequence[str],
        dim: int,
        adapters: Mapping[str, Any],
        raw: bool = True,
        *,
        hidden: int,
        bottleneck: int,
        out: int,
        save: str = "teacher",
        train_head: bool = False,
    ) -> None:
        super().__init__(clip, classnames, dim, adapters, raw)
        self.head = DINOHead(clip.embed_dim, hidden=hidden, bottleneck=bottleneck, out=out)
        self.teacher = nn.ModuleDict({"adapters": copy.deepcopy(self.adapters), "head": copy.deepcopy(self.head)})
        self.teacher.requires_grad_(False)
        assert isinstance(self.teacher["adapters"], IMOAdapters)
        self.teacher["adapters"].dropout = Dropout(0.0)
        self.head.requires_grad_(train_head)
        self.train_head = train_head
        self.register_buffer("centre", torch.zeros(out))
        self.save = save

    def take_form(self, record: Mapping[str, Any]) -> None:
        """Take over the form of a checkpoint's adapters, in the teacher too; see AdapterLearner."""
        super().take_form(record)
        teacher = self.teacher["adapters"]
        assert isinstance(teacher, IMOAdapters)
        teacher.take_form(record.get("adapters", {}))

    @property
    def result(self) -> IMOAdapters:
        """The adapters that are saved, the student's or the teacher's; see AdapterLearner."""
        adapters = self.teacher["adapters"] if self.save == "teacher" else self.adapters
        assert isinstance(adapters, IMOAdapters)
        return adapters

    def follow(self, momentum: float) -> None:
        """Move the teacher towards the student."""
        update_teacher(self.teacher["adapters"].parameters(), self.adapters.parameters(), momentum)
        if self.train_head:  # else both heads are equal, and a mean of equal numbers would only round
            update_teacher(self.teacher["head"].parameters(), self.head.parameters(), momentum)


class IMONetwork(Classifier):
    """CLIP with adapters. Zero-shot weights are those of the generic set's class names."""

    learner: AdapterLearner

    def corrected(self, images: Tensor) -> Tensor:
        """Return features [B, E] with the adapters that are saved, normalized, fp32."""
        return self.learner.result.encode(self.clip, images)

    def forward(self, images: Tensor) -> Tensor:
        """Return the classifier's logits [B, C] for images [B, 3, H, W]."""
        learner = self.learner
        assert isinstance(learner, SupervisedLearner)
        features = learner.trained_input(self.clip, learner.adapters, images, learner.scale)
        with torch.autocast(device_type=features.device.type, enabled=False):
            return learner.classifier(features)

    def student(self, crops: Tensor) -> Tensor:
        """Return the student's outputs [n, K] for crops [n, 3, S, S]."""
        learner = self.learner
        assert isinstance(learner, DINOLearner)
        return learner.head(learner.trained_input(self.clip, learner.adapters, crops, self.clip.embed_dim**0.5))

    @torch.no_grad()
    def teacher(self, crops: Tensor) -> Tensor:
        """Return the teacher's outputs [n, K] for crops [n, 3, S, S]."""
        learner = self.learner
        assert isinstance(learner, DINOLearner)
        adapters = learner.teacher["adapters"]
        assert isinstance(adapters, IMOAdapters)
        return learner.teacher["head"](learner.trained_input(self.clip, adapters, crops, self.clip.embed_dim**0.5))

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, C] of zero-shot CLIP for images, and those of corrected features with the same text."""
        plain = self.logits(self.clip.encode_image(images), self.zeroshot)
        return plain, self.logits(self.corrected(images), self.zeroshot)

"""Share what methods beside a frozen CLIP have in common: a learner that describes itself, a classifier around it.

Legend: B images, C classes, E width of the joint embedding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clip import CLIP, zeroshot_weights
from ..features.kept_views import FrozenPart

# Name of a learner's fact -> what an error message calls that fact.
FACTS = {
    "backbone": "backbone",
    "weights_digest": "CLIP weights with sha256",
    "context": "the prompt context",
    "glr_mode": "TRAINER.DLRCLIP.GLR_MODE",
    "features": "TRAINER.LINEARPROBE.FEATURES",
    "auxiliary": "auxiliary features",
}


def pack_record(record: Mapping[str, Any]) -> Tensor:
    """Pack plain values as JSON in a uint8 tensor, which even a loader that admits only tensors can read."""
    return torch.tensor(list(json.dumps(record).encode("utf-8")), dtype=torch.uint8)


def unpack_record(state: Tensor) -> dict[str, Any]:
    """Unpack the values that `pack_record` packed.

    Raises:
        ValueError: the tensor holds no such record.
    """
    try:
        record = json.loads(bytes(state.cpu().tolist()).decode("utf-8"))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"Expected the record of a checkpoint to be JSON but got: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"Expected the record of a checkpoint to be an object but got {type(record).__name__}")
    return record


def known_rows(names: Sequence[str], trained: Sequence[str], indices: Sequence[int] | None) -> list[int | None]:
    """Return the position of each of `names` among the classes trained on; None: it was not trained on.

    A name that was trained on twice is not known by its name alone.

    Args:
        indices: those positions, where the dataset knows them (names alone do not tell classes of one name apart).
    """
    if list(names) == list(trained):
        return list(range(len(trained)))
    valid = indices is not None and all(0 <= i < len(trained) for i in indices)
    if indices is not None and valid and [trained[i] for i in indices] == list(names):
        return list(indices)
    return [list(trained).index(name) if list(trained).count(name) == 1 else None for name in names]


def class_rows(
    names: Sequence[str], trained: Sequence[str], indices: Sequence[int] | None, each: str = "a part"
) -> list[int]:
    """Return the position of each of `names` among the classes trained on.

    Args:
        indices: see `known_rows`.
        each: what is learnt or kept for each class separately, for the message.

    Raises:
        ValueError: not all of `names` were trained on.
    """
    rows = known_rows(names, trained, indices)
    unknown = [name for name, row in zip(names, rows, strict=True) if row is None]
    if unknown:
        raise ValueError(
            f"Expected classes that were trained on, as each has {each} of its own, but got {unknown[0]!r} "
            f"and {len(unknown) - 1} others that were not"
        )
    return [row for row in rows if row is not None]


class Peek:
    """Read one-element tensors, each again only when it may have changed: a read makes the program wait for the GPU."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[Any, float]] = {}  # name -> (address and version when read, value)

    def __call__(self, name: str, tensor: Tensor) -> float:
        """Return the value of the tensor that goes by this name."""
        key = tensor.data_ptr(), tensor._version
        if name not in self._read or self._read[name][0] != key:
            self._read[name] = key, float(tensor)
        return self._read[name][1]


class Learner(nn.Module):
    """A module that is trained and saved; its checkpoint says for which classes and for which CLIP it was trained.

    Attributes:
        classnames: the class list trained on.
        facts: plain values; a checkpoint must have the same ones to be used with this learner. Names as in FACTS.
    """

    RECOMPUTED: tuple[str, ...] = ()  # entries of a checkpoint that follow from the class names: not loaded
    UNSAID: Mapping[str, Any] = {}  # facts that hold for older checkpoints, whose records do not have them yet

    def __init__(self, classnames: Sequence[str], facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.classnames = list(classnames)
        self.facts = dict(facts)

    def get_extra_state(self) -> Tensor:
        """Return the class list and the facts, packed for a checkpoint."""
        return pack_record({"classnames": self.classnames, "facts": self.facts})

    def set_extra_state(self, state: Tensor) -> None:
        """Adopt a checkpoint's facts; the class list stays the present one, and `take` has checked the facts."""
        facts = unpack_record(state).get("facts", {})
        self.adopt(facts if isinstance(facts, Mapping) else {})

    def adopt(self, facts: Mapping[str, Any]) -> None:
        """Take over what a checkpoint's facts, or their absence, say about the learner's own form; here nothing."""

    def take(self, state: Mapping[str, Tensor], indices: Sequence[int] | None = None) -> None:
        """Load a checkpoint's state, whose class list may differ from the present one.

        Args:
            state: a state dict of such a learner. Its record may be absent: published checkpoints have none.
            indices: position of each present class among those trained on, where the dataset says so.

        Raises:
            ValueError: the checkpoint was made for another CLIP, or does not fit this learner.
        """
        state = {name: value for name, value in state.items() if name not in self.RECOMPUTED}
        packed = state.pop("_extra_state", None)
        record = {} if packed is None else unpack_record(packed)
        facts, trained = record.get("facts", {}), record.get("classnames")
        names = trained is None or (isinstance(trained, list) and all(isinstance(name, str) for name in trained))
        if not isinstance(facts, Mapping) or not names:
            raise ValueError("Expected the record of a checkpoint to have facts and class names but got something else")
        other = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if other:
            raise ValueError(f"Expected every entry of a checkpoint to be a tensor but {other[0]!r} is not")
        facts = {**self.UNSAID, **facts}
        self.adopt(facts)
        for name, ours in self.facts.items():
            if name in facts and facts[name] != ours:
                raise ValueError(f"Expected a checkpoint for {FACTS.get(name, name)} {ours!r} but got {facts[name]!r}")
        own = self.state_dict()
        wanted = own.keys() - {*self.RECOMPUTED, "_extra_state"}
        missing, unexpected = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
        if missing or unexpected:
            raise ValueError(
                f"Expected a checkpoint made with the same settings, so with {len(wanted)} entries such as "
                f"{sorted(wanted)[0]}, but it lacks "
                f"{missing[:3]} and has {unexpected[:3]} beside (the first three of each)"
            )
        state = self.for_classes(state, trained, indices)
        own = self.state_dict()  # `for_classes` may have changed its shapes
        for name in sorted(wanted):
            if state[name].shape != own[name].shape:
                raise ValueError(
                    f"Expected {name} to have shape {tuple(own[name].shape)} but got {tuple(state[name].shape)}"
                )
        self.load_state_dict({**own, **state})

    def for_classes(
        self, state: dict[str, Tensor], trained: Sequence[str] | None, indices: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """Return the part of `state`, trained on the classes `trained`, that the present classes need; here all."""
        return state


class TextCache:
    """Keep text features while nothing that they depend on is learnt."""

    def __init__(self) -> None:
        self._known: tuple[Any, Tensor] | None = None

    def get(self, module: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
        """Return the features [C, E]: computed anew in training, else once, until a parameter has changed.

        Args:
            module: what the features depend on, by its parameters and by its mode (training or evaluation).
            compute: computes the features.
        """
        if module.training:
            self._known = None
            return compute()
        key = tuple((p.data_ptr(), p._version) for p in module.parameters())
        if self._known is None or self._known[0] != key:
            with torch.no_grad():
                self._known = key, compute()
        return self._known[1]


class Classifier(nn.Module):
    """A frozen CLIP with a learner beside it. Only `learner` is to be trained and saved.

    A subclass says in `classify` what it makes of the frozen part of the images, and in `first_adapted` what that is.

    Args:
        clip: a frozen CLIP, on its device.
        classnames: class names in the order of their labels.
        templates: prompt templates of the zero-shot reference, each with one "{}".
        learner: what is trained; moved to CLIP's device.
    """

    zeroshot: Tensor  # [C, E], normalized
    # The first block of the image tower that the learner changes; what comes before it is frozen. None: no block; the
    # frozen part of an image is its feature.
    first_adapted: int | None = None

    def __init__(self, clip: CLIP, classnames: Sequence[str], templates: Sequence[str], learner: Learner) -> None:
        super().__init__()
        self.clip = clip
        self.classnames = list(classnames)
        self.learner = learner.to(clip.device)
        with torch.no_grad():
            zeroshot = zeroshot_weights(clip, classnames, templates).float()
        self.register_buffer("zeroshot", zeroshot, persistent=False)
        self._cache = TextCache()

    @torch.no_grad()
    def frozen_part(self, images: Tensor) -> FrozenPart:
        """Return what does not depend on what is learnt, for images [B, 3, H, W].

        Where no block is adapted, these are the features [B, E], fp32, not normalized; else what enters the first
        adapted block.
        """
        if self.first_adapted is None:
            return FrozenPart(features=self.clip.encode_image(images).float())
        return FrozenPart(hidden=self.clip.visual.prefix(images, self.first_adapted - 1))

    def classify(self, part: FrozenPart) -> Tensor:
        """Return logits [B, C], with gradients, for the frozen part of images."""
        raise NotImplementedError

    def forward(self, images: Any) -> Tensor:
        """Return logits [B, C], with gradients, for images [B, 3, H, W] or their frozen part."""
        return self.classify(images if isinstance(images, FrozenPart) else self.frozen_part(images))

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return zero-shot logits and the method's, [B, C] each, for images [B, 3, H, W].

        The learner is in evaluation mode.
        """
        part = self.frozen_part(images)
        features = part.features
        if features is None:
            assert part.hidden is not None and self.first_adapted is not None
            features = self.clip.visual.suffix(part.hidden, self.first_adapted)
        return self.logits(features, self.zeroshot), self.classify(part)

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Return logits [B, C] for features [B, E] and normalized text features [C, E], in fp32 even under autocast."""
        with torch.autocast(device_type=image_features.device.type, enabled=False):
            return self.clip.logit_scale * F.normalize(image_features.float(), dim=-1) @ text_features.t()

    def compute_text(self) -> Tensor:
        """Compute the learner's text features [C, E], normalized, fp32."""
        raise NotImplementedError

    def text_features(self) -> Tensor:
        """Return `compute_text()`, computed every time in training, else once, until a parameter has changed."""
        return self._cache.get(self.learner, self.compute_text)

    def train(self, mode: bool = True) -> Classifier:
        """Set the learner's mode; the frozen CLIP stays in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        return self

"""What the loop and its hooks know about the running epoch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dassl.utils import AverageMeter, MetricMeter


@dataclass
class EpochStats:
    """Filled in by the hooks step by step; a new one for each epoch. Times in seconds."""

    losses: MetricMeter = field(default_factory=MetricMeter)
    batch_time: AverageMeter = field(default_factory=AverageMeter)
    data_time: AverageMeter = field(default_factory=AverageMeter)
    batches: tuple[Any, ...] = ()  # what the loaders gave for this step
    images: int = 0  # in them, those of all processes
    summary: dict[str, float] = field(default_factory=dict)  # what forward_backward returned
    lr: float = 0.0  # the learning rate this step used


def count_images(batches: Iterable[Any]) -> int:
    """Number of images in the batches of one step (several views of an image count once)."""
    total = 0
    for batch in batches:
        if not isinstance(batch, Mapping):
            continue
        images = batch.get("img", batch.get("label", ()))
        if isinstance(images, list | tuple) and images and hasattr(images[0], "shape"):
            images = images[0]  # K_TRANSFORMS > 1: a list of views
        total += len(images)
    return total

"""Hold what the loop and its hooks know about the running epoch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dassl.utils import AverageMeter, MetricMeter


@dataclass
class EpochStats:
    """Figures of one epoch, which the hooks fill in step by step; each epoch has a new object. Times in seconds."""

    losses: MetricMeter = field(default_factory=MetricMeter)
    batch_time: AverageMeter = field(default_factory=AverageMeter)
    data_time: AverageMeter = field(default_factory=AverageMeter)
    batches: tuple[Any, ...] = ()  # what the loaders gave for this step
    images: int = 0  # number of images in these batches, of all processes
    summary: dict[str, float] = field(default_factory=dict)  # what forward_backward returned
    lr: float = 0.0  # the learning rate this step used

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Return the losses' running means, for a run that is resumed within the epoch.

        Times are not among them: they begin anew in the resumed run.
        """
        return {name: {"sum": m.sum, "count": m.count, "val": m.val} for name, m in self.losses.meters.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Put ``state_dict`` back."""
        for name, values in state.items():
            meter = self.losses.meters[name]
            meter.sum, meter.count, meter.val = values["sum"], int(values["count"]), values["val"]
            meter.avg = meter.sum / meter.count


def count_images(batches: Iterable[Any]) -> int:
    """Count the images in the batches of one step (several views of an image count once)."""
    total = 0
    for batch in batches:
        if not isinstance(batch, Mapping):
            continue
        images = batch.get("img", batch.get("label", ()))
        if isinstance(images, list | tuple) and images and hasattr(images[0], "shape"):
            images = images[0]  # K_TRANSFORMS > 1: a list of views
        total += len(images)
    return total

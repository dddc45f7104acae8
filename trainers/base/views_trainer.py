"""Train on images, or on what the frozen blocks of the image tower make of a few seeded views of each (INPUT.VIEWS)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..features.kept_views import GIB, FrozenPart, ViewLoader
from .keys import key
from .learner_trainer import LearnerTrainer


@dataclass(frozen=True)
class ViewsKeys:
    """Keys of INPUT that say how many views of training images are kept, and where."""

    views: int = key(
        0,
        "seeded augmentations of each training image; epoch e uses view e mod VIEWS, and what the frozen blocks make "
        "of a view is computed once and kept; 0: fresh augmentation in every epoch",
        low=0,
        source="0",
    )
    views_memory: float = key(4.0, "GiB of RAM (in each process) to keep the views in; more goes to a file", low=0)


class ViewsTrainer(LearnerTrainer):
    """Train a network on images [B, 3, H, W] or, with INPUT.VIEWS, on their frozen part, which is computed once.

    The network has a method `frozen_part`, images -> FrozenPart. A trainer calls `keep_views` at the end of
    `build_model`, and its step takes both: `parse_batch_train` gives images or a FrozenPart.
    """

    extra_keys = {"INPUT": ViewsKeys}
    no_views = ""  # why no part of the image tower can be computed once and kept; "": it can
    _views: ViewLoader | None = None

    @classmethod
    def check_settings(cls, cfg: Any) -> None:
        """Check the settings; see CLIPTrainer.

        Raises:
            ValueError: as there, or INPUT.VIEWS is set for a method that can keep nothing.
        """
        if cls.no_views and cfg.INPUT.get("VIEWS", 0):
            raise ValueError(
                f"Expected INPUT.VIEWS to be 0 for {cls.__name__}, {cls.no_views}, but got {cfg.INPUT.VIEWS!r}"
            )
        super().check_settings(cfg)

    def keep_views(self) -> None:
        """Replace the training loader, where INPUT.VIEWS is set, by one of kept views.

        Its batches carry what the frozen blocks make of the images, instead of images.
        """
        cfg, items = self.cfg, self.dm.dataset.train_x
        views = int(cfg.INPUT.get("VIEWS", 0))
        if not views or not items:  # built without images, to predict
            return
        seed = self.seed_or_draw()
        budget = cfg.INPUT.VIEWS_MEMORY * GIB
        loader = self.train_loader_x
        self._views = ViewLoader(loader, items, self._frozen_part, views, seed, budget, self.output_dir, self.device)
        self.train_loader_x: Any = self._views

    def _frozen_part(self, images: Tensor) -> FrozenPart:
        with self._autocast():
            return self.network.frozen_part(images.to(self.device))

    def before_epoch(self) -> None:
        """Let the kept views follow the epoch."""
        super().before_epoch()
        if self._views is not None:
            self._views.set_epoch(self.epoch)

    def after_train(self) -> None:
        """Release the memory or file of the kept views, then test."""
        if self._views is not None:
            self._views.close()
        super().after_train()

    def parse_batch_train(self, batch: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """Take the images [B, 3, H, W], or the frozen part of them (see INPUT.VIEWS), and the labels [B]."""
        if "img" in batch:
            return super().parse_batch_train(batch)
        part = FrozenPart(batch.get("feature"), batch.get("hidden"))
        return part, batch["label"].to(self.device, non_blocking=True)

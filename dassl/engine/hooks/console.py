"""The progress line, in the form that readers of upstream's logs know."""

from __future__ import annotations

import datetime
import logging
from typing import TYPE_CHECKING

from dassl.evaluation.passes import lines_above_bars
from dassl.utils.logger import DETAIL

from .base import HookBase

if TYPE_CHECKING:
    from dassl.engine.trainer import SimpleTrainer

logger = logging.getLogger(__name__)


class ConsoleLine(HookBase):
    """Log a line every ``print_freq`` steps, or each step of an epoch with fewer; values have their epoch means."""

    def __init__(self, print_freq: int) -> None:
        self.print_freq = print_freq

    def after_step(self, trainer: SimpleTrainer) -> None:
        few = trainer.num_batches < self.print_freq
        if not few and (trainer.batch_idx + 1) % self.print_freq != 0:
            return
        stats = trainer.stats
        left = trainer.num_batches - trainer.batch_idx - 1
        left += (trainer.max_epoch - trainer.epoch - 1) * trainer.num_batches
        parts = [
            trainer.where(),
            f"time {stats.batch_time.val:.3f} ({stats.batch_time.avg:.3f})",
            f"data {stats.data_time.val:.3f} ({stats.data_time.avg:.3f})",
            str(stats.losses),
            f"lr {stats.lr:.4e}",
            f"eta {datetime.timedelta(seconds=int(stats.batch_time.avg * left))}",
        ]
        with lines_above_bars():
            logger.info("%s", " ".join(part for part in parts if part), extra=DETAIL)

"""TensorBoard's writer for long runs: a run goes on when the file of its curves cannot be written any more."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dassl.evaluation.drawing import Picture

from .trackers import Tracker

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 30  # at most the values of this time are missing in a browser, or from the file of a killed run


class Board:
    """A SummaryWriter that goes silent, after one warning, when its file cannot be written any more.

    Its methods are the SummaryWriter's but for `add_hparams` and `add_picture`. Curves are a by-product; what a run
    cannot do without (checkpoints, results) still raises.

    Args:
        log_dir: folder of the event file, made when missing.
        purge_step: older values from this step on are hidden; None: none are.
        tracker: takes numbers, pictures and settings, too; None: there is none.
    """

    def __init__(
        self, log_dir: str | os.PathLike[str], purge_step: int | None = None, tracker: Tracker | None = None
    ) -> None:
        self._broken = False
        self._tracker = tracker
        self._writer = SummaryWriter(log_dir=str(log_dir), purge_step=purge_step, flush_secs=FLUSH_SECONDS)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._writer, name)
        return self._guarded(method) if callable(method) else method

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int) -> None:
        """Add a number."""
        self._guarded(self._writer.add_scalar)(tag, scalar_value, global_step)
        if self._tracker is not None:
            self._tracker.scalar(tag, float(scalar_value), global_step)

    def add_image(self, tag: str, image: np.ndarray, global_step: int, dataformats: str = "HWC") -> None:
        """Add a picture, uint8 [H, W, 3]."""
        self._guarded(self._writer.add_image)(tag, image, global_step, dataformats=dataformats)
        if self._tracker is not None and dataformats == "HWC":
            self._tracker.image(tag, np.asarray(image), global_step)

    def add_picture(self, tag: str, picture: Picture, global_step: int) -> None:
        """Add a picture as the PNG file that it has; `add_image` would encode it once more."""
        height, width, colors = picture.pixels.shape
        image = Summary.Image(height=height, width=width, colorspace=colors, encoded_image_string=picture.png)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._guarded(self._writer._get_file_writer().add_summary)(summary, global_step)
        if self._tracker is not None:
            self._tracker.image(tag, picture.pixels, global_step)

    def add_hparams(self, parameters: Mapping[str, Any], tags: Iterable[str]) -> None:
        """Add hyper-parameters, and say which scalars stand beside them.

        SummaryWriter's method of this name would write the scalars, too, which are there already.
        """
        for summary in hparams(dict(parameters), dict.fromkeys(tags, 0.0)):
            self._guarded(self._writer._get_file_writer().add_summary)(summary)
        if self._tracker is not None:
            self._tracker.settings(parameters)

    def _guarded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self._broken:
                return None
            try:
                return method(*args, **kwargs)
            except OSError as error:  # of this call, or of the thread that writes what earlier calls queued
                self._broken = True
                logger.warning("TensorBoard's file cannot be written, its curves end here: %s", error.strerror or error)
                return None

        return guarded

    def close(self) -> None:
        """Write what is queued and close the file."""
        try:
            self._writer.close()
        except OSError as error:
            if not self._broken:
                logger.warning("TensorBoard's file cannot be written: %s", error.strerror or error)
        self._broken = True
        if self._tracker is not None:
            self._tracker.close()


def _silence_event_thread() -> None:
    """Silence the traceback of an OSError in the thread that writes event files.

    That thread also hands the error to the writer, where ``Board`` meets it.
    """
    before = threading.excepthook

    def hook(arguments: Any) -> None:
        writing = type(arguments.thread).__module__ == "tensorboard.summary.writer.event_file_writer"
        if not (writing and isinstance(arguments.exc_value, OSError)):
            before(arguments)

    threading.excepthook = hook


_silence_event_thread()

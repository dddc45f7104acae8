"""Share a GPU day among its parts: the device, the sizes, the time that is left, and the rows that they write."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

Row = dict[str, Any]


class OutOfTime(BaseException):
    """A part has used up its time. No Exception: what catches those must not swallow it."""


@dataclass(frozen=True)
class Sizes:
    """Set the sizes of everything that is measured.

    Attributes:
        classes, batches: of the steps.
        rounds: of each measurement; medians count.
        square: side of the matrices whose product gives the device's rate.
        numbers: fp32 values in the tensor whose copy gives the copy rate.
        images: of an evaluation pass.
        files: JPEG images that are written. items: of the training set that lists them, as often as it takes.
        workers: processes that read images.
        steps: of the comparison with the CPU. small: batch of that comparison.
    """

    classes: tuple[int, ...] = (100, 1000)
    batches: tuple[int, ...] = (128, 16)
    rounds: int = 7
    square: int = 8192
    numbers: int = 2**28
    images: int = 1000
    files: int = 256
    items: int = 4096
    workers: int = 16
    steps: int = 12
    small: int = 8


TRIAL = Sizes(
    classes=(5,),
    batches=(3,),
    rounds=1,
    square=64,
    numbers=2**12,
    images=4,
    files=2,
    items=6,
    workers=0,
    steps=2,
    small=2,
)


@dataclass
class Session:
    """One run of the script.

    Attributes:
        device: where is measured.
        model: a name of `benchmarks.subject.MODELS`.
        sizes: how large everything is.
        scratch: a folder for images and the like.
        ends: the monotonic time at which the running part must be through.
        save: called after each row.
        rows: of the running part.
        rates: matrix products a second by kind of number, as measured by the part "facts".
    """

    device: torch.device
    model: str
    sizes: Sizes
    scratch: Path
    save: Callable[[], None]
    ends: float = float("inf")
    rows: list[Row] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    clips: dict[Any, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Say whether a GPU is measured."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds that the running part still has."""
        return self.ends - time.monotonic()

    def add(self, **row: Any) -> None:
        """Keep a row, write it to the file, and tell it in one line."""
        self.rows.append(row)
        self.save()
        print("  " + " ".join(f"{k}={_short(v)}" for k, v in row.items() if _short(v)), flush=True)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, (str, int)) and len(str(value)) < 60 else ""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside when the seconds are over; outside of the main thread nothing watches the clock."""
    if threading.current_thread() is not threading.main_thread() or seconds == float("inf"):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that the file is always a whole one, the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    other = path.with_suffix(".part")
    other.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    other.replace(path)

"""Try an exported file on images: how far its probabilities are from predict.py's, how accurate and how fast it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from .subject import Examples

Run = Callable[[Tensor], Tensor]  # a batch of inputs -> probabilities [B, C], fp32
TOLERANCE = 1e-4  # by how much a probability in fp32 may differ
BATCH = 32
RUNS = 20
COLUMNS = ("file", "MB", "ms for an image", "accuracy %", "largest difference", "same answer %")


@dataclass(frozen=True)
class Row:
    """Hold what is measured of one file.

    Attributes:
        name: the file's name, or "PyTorch".
        size: in bytes; 0: there is no file.
        latency: median seconds for one image, of 20 runs.
        accuracy: in percent, of the images whose class is known; None: of none.
        difference: the largest difference of a probability from predict.py's.
        same: in percent, the images with predict.py's answer.
    """

    name: str
    size: int
    latency: float
    accuracy: float | None
    difference: float
    same: float

    def cells(self) -> list[str]:
        """Return the row under COLUMNS."""
        return [
            self.name,
            f"{self.size / 1e6:.2f}" if self.size else "",
            f"{1000 * self.latency:.1f}",
            "" if self.accuracy is None else f"{self.accuracy:.1f}",
            f"{self.difference:.1e}",
            f"{self.same:.1f}",
        ]


@dataclass(frozen=True)
class ExportReport:
    """Tell what has been written, and what was measured of it.

    Attributes:
        files: what was written: files, or a folder.
        format: one of FORMATS.
        method: name of the trainer.
        images: the images that the files were tried on, for people.
        threads: of the processor, that latencies were measured with.
        rows: PyTorch's, then each file's.
    """

    files: tuple[Path, ...]
    format: str
    method: str
    images: str
    threads: int
    rows: tuple[Row, ...]

    @property
    def difference(self) -> float:
        """The largest difference of a probability in fp32 from predict.py's."""
        return self.rows[1].difference

    def __str__(self) -> str:
        """Return the table, and a line about the images."""
        cells = [row.cells() for row in self.rows]
        align = ["left", *["right"] * (len(COLUMNS) - 1)]
        shown = tabulate(cells, COLUMNS, disable_numparse=True, colalign=align)
        threads = "thread" if self.threads == 1 else "threads"
        return f"{shown}\n{self.method}, on {self.images}, with {self.threads} {threads} of the processor"

    def to_dict(self) -> dict[str, Any]:
        """Return what was measured as plain values, for a file."""
        return {"images": self.images, "threads": self.threads, "rows": [asdict(row) for row in self.rows]}


@torch.no_grad()
def measure(name: str, run: Run, inputs: Tensor, examples: Examples, size: int = 0) -> tuple[Row, bool]:
    """Return the row of a file, and whether all its probabilities are finite.

    Images go in batches of 32, of what is left, and of one, so that a number of images that has become a constant of
    the file is noticed.

    Args:
        name: what the row is called.
        run: computes probabilities.
        inputs: what it takes: images, [N, ...].
        examples: the same images, with what predict.py says of them.
        size: of the file, in bytes.
    """
    batched = torch.cat([run(batch) for batch in inputs.split(BATCH)])
    single = torch.cat([run(image) for image in inputs[:3].split(1)])
    known = examples.expected
    difference = max(float((batched - known).abs().max()), float((single - known[: len(single)]).abs().max()))
    answers = batched.argmax(dim=1)
    accuracy = None
    if examples.labels is not None:
        accuracy = 100 * float((answers == examples.labels).double().mean())
    same = 100 * float((answers == known.argmax(dim=1)).double().mean())
    finite = bool(batched.isfinite().all() and single.isfinite().all())
    return Row(name, size, median_latency(run, inputs[:1]), accuracy, difference, same), finite


def median_latency(run: Run, image: Tensor) -> float:
    """Return the median seconds of 20 runs on one image; one more goes before them."""
    seconds: Sequence[float] = [_seconds(run, image) for _ in range(RUNS + 1)][1:]
    return statistics.median(seconds)


def _seconds(run: Run, image: Tensor) -> float:
    began = time.perf_counter()
    run(image)
    return time.perf_counter() - began

"""Clocks, the machine's matrix rate on given shapes, and what a results file says about where it was made."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.flops import Product, total

_SMALL = 0.005  # shapes with a smaller share of the FLOPs are not timed; they count at the mean rate of the others


class Stopwatch:
    """Adds up the seconds spent in its `with` blocks; on a GPU by events, with what was queued before kept out."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        if self.cuda:
            torch.cuda.synchronize()
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._start.record()
        else:
            self._from = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self._end.record()
            torch.cuda.synchronize()
            self.seconds += self._start.elapsed_time(self._end) / 1000
        else:
            self.seconds += time.perf_counter() - self._from


class CPUWatch(Stopwatch):
    """A stopwatch that adds up the CPU seconds of the process's threads, too."""

    cpu = 0.0

    def __enter__(self) -> CPUWatch:
        self._cpu_from = time.process_time()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.cpu += time.process_time() - self._cpu_from


class MatrixRate:
    """Seconds of matrix products, measured shape by shape.

    `measure` is called between the steps, so that both see the same machine; the median over its calls counts.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, products: Iterable[Product]) -> None:
        self.device, self.dtype = device, dtype
        flops: dict[tuple[int, int, int, int], int] = {}
        for product in products:
            flops[product.shape] = flops.get(product.shape, 0) + product.flops
        everything = sum(flops.values())
        self._times: dict[tuple[int, int, int, int], list[float]] = {
            shape: [] for shape, amount in flops.items() if amount >= _SMALL * everything
        }

    def _operands(self, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        batch, m, k, n = shape
        lead = (batch,) if batch > 1 else ()
        a = torch.randn(*lead, m, k, device=self.device).to(self.dtype)
        b = torch.randn(*lead, n, k, device=self.device).to(self.dtype)
        return a, b.transpose(-1, -2)  # as a layer's weight [n, k] comes

    @torch.no_grad()
    def measure(self, repeats: int = 1) -> None:
        """Times every shape once more."""
        for shape, times in self._times.items():
            a, b = self._operands(shape)
            torch.matmul(a, b)  # touches the memory
            watch = Stopwatch(self.device)
            with watch:
                for _ in range(repeats):
                    torch.matmul(a, b)
            times.append(watch.seconds / repeats)

    def seconds(self, products: Sequence[Product]) -> float:
        """Return the seconds of the products one after the other, each at the rate of its shape."""
        known = [p for p in products if p.shape in self._times]
        taken = sum(p.times * statistics.median(self._times[p.shape]) for p in known)
        return taken * total(products) / total(known)


def biggest(values: Iterable[float]) -> float:
    """The largest value; nan if one of them is nan."""
    found = list(values)
    return math.nan if any(math.isnan(v) for v in found) else max(found)


def operator_times(function: Callable[[], Any], device: torch.device, rows: int = 12) -> list[dict[str, Any]]:
    """Find the operators of a call with the most time of their own, in shares of all."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as found:
        function()
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda e: getattr(e, own), reverse=True)
    whole = sum(getattr(e, own) for e in events) or 1.0
    return [
        {"operator": e.key, "calls": e.count, "share": getattr(e, own) / whole}
        for e in events[:rows]
        if getattr(e, own) > 0
    ]


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine and the date of a figure."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def free_memory(device: torch.device) -> float:
    """Bytes that can be had; infinite where that is not known."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    return next((float(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), math.inf)


def peak_memory() -> int:
    """The most bytes that this process has held."""
    import resource  # not on Windows, where the rest of this file works

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Writes a results file; its folder is made."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

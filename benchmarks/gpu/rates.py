"""The part "facts": what the device is, and how fast it multiplies large matrices and copies."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from typing import Any

import torch

from benchmarks.gpu.session import Session
from benchmarks.gpu.ways import matrix_precision
from benchmarks.measure import Stopwatch, machine

KINDS: dict[str, tuple[torch.dtype, bool]] = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()


@torch.no_grad()
def _matrix_rate(session: Session, kind: str) -> float:
    dtype, tf32 = KINDS[kind]
    size, times = session.sizes.square, []
    a, b = (torch.randn(size, size, device=session.device).to(dtype) for _ in range(2))
    with matrix_precision(tf32):
        for _ in range(3):
            torch.matmul(a, b)
        for _ in range(session.sizes.rounds):
            repeats = 4 if kind == "fp32" else 20
            watch = Stopwatch(session.device)
            with watch:
                for _ in range(repeats):
                    torch.matmul(a, b)
            times.append(watch.seconds / repeats)
    return 2 * size**3 / statistics.median(times)


@torch.no_grad()
def _copy_rate(session: Session) -> dict[str, float]:
    """Bytes a second: read and written on the device; from pinned and from pageable host memory to it."""
    source = torch.randn(session.sizes.numbers, device=session.device)
    target = torch.empty_like(source)
    host = torch.randn(session.sizes.numbers // 8)
    found: dict[str, float] = {}
    kinds: dict[str, tuple[Any, Any, int]] = {
        "device": (target, source, 2 * source.nbytes),
        "pageable": (target[: len(host)], host, host.nbytes),
    }
    if session.cuda:
        kinds["pinned"] = (target[: len(host)], host.pin_memory(), host.nbytes)
    for name, (to, of, size) in kinds.items():
        times = []
        for _ in range(session.sizes.rounds + 1):
            watch = Stopwatch(session.device)
            with watch:
                to.copy_(of, non_blocking=True)
            times.append(watch.seconds)
        found[name] = size / statistics.median(times[1:])
    return found


def facts(session: Session) -> None:
    """Rows: the machine; each matrix rate; the copy rates."""
    about: dict[str, Any] = {"what": "machine", **machine(session.device), "driver": _driver()}
    if session.cuda:
        properties = torch.cuda.get_device_properties(session.device)
        about |= {
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    session.add(**about)
    for kind in KINDS if session.cuda else ("bf16", "fp32"):
        session.rates[kind] = _matrix_rate(session, kind)
        session.add(what="matrix rate", kind=kind, tflops=session.rates[kind] / 1e12, square=session.sizes.square)
    session.add(what="copy rate", **{name: rate / 1e9 for name, rate in _copy_rate(session).items()})

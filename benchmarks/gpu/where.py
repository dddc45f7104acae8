"""The part "profile": which kernels a DLR-CLIP step spends its time in, and how long the GPU has nothing to do."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.session import Session
from benchmarks.gpu.steps import MODES
from benchmarks.gpu.subjects import random_batch, trainer_of
from benchmarks.gpu.ways import FromHost, Views, matrix_precision

# Kinds of kernels by what their names contain, the first that fits.
_KINDS = {
    "attention": ("flash", "fmha", "attention", "mha", "sdpa"),
    "matrix products": ("gemm", "cutlass", "nvjet", "cublas", "wgmma", "splitk", "gemv", "addmm", "::mm", "aten::bmm"),
    "normalization": ("layer_norm", "layernorm", "gammabeta"),
    "softmax": ("softmax",),
    "copies": ("memcpy", "copy", "cat", "memset", "fillfunctor"),
    "optimizer and checks": ("multi_tensor", "foreach", "amp_"),
    "reductions": ("reduce",),
    "elementwise": ("elementwise", "silu", "sigmoid", "add", "mul"),
}
_ROWS = 30


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    low = name.lower()
    return next((kind for kind, parts in _KINDS.items() if any(part in low for part in parts)), "other")


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length that spans cover together."""
    whole, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        whole += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return whole


def _profiled(session: Session, way: Any, number: int) -> dict[str, Any]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if session.cuda else [])
    with profile(activities=activities) as found:
        start = time.perf_counter()
        for _ in range(number):
            way.step()
        if session.cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
    here = DeviceType.CUDA if session.cuda else DeviceType.CPU
    events = [e for e in found.events() or () if e.device_type == here]
    if not session.cuda:
        events = [e for e in events if not e.cpu_children]
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in events:
        kernels[event.name].append(event.time_range.elapsed_us())
    busy = covered((e.time_range.start, e.time_range.end) for e in events) * 1e-6
    kinds: dict[str, float] = defaultdict(float)
    for name, times in kernels.items():
        kinds[kind_of(name)] += sum(times) * 1e-3 / number
    most = sorted(kernels, key=lambda name: -sum(kernels[name]))[:_ROWS]
    calls = {
        e.key: e.count for e in found.key_averages() if e.key.startswith(("cudaLaunch", "cuLaunch", "cudaStreamSyn"))
    }
    return {
        "wall": wall / number,
        "busy": busy / number,
        "idle share": max(0.0, 1 - busy / wall),
        "kernels": sum(map(len, kernels.values())) / number,
        "milliseconds by kind": {k: round(v, 4) for k, v in sorted(kinds.items(), key=lambda item: -item[1])},
        "calls": {name: count / number for name, count in calls.items()},
        "top": [
            {"name": n[:160], "calls": len(kernels[n]) / number, "ms": round(sum(kernels[n]) * 1e-3 / number, 4)}
            for n in most
        ],
    }


def where(session: Session) -> None:
    """Rows: a step in bf16 on fresh images and on kept views, at each batch size."""
    mode, classes = "bf16", session.sizes.classes[0]
    precision, tf32 = MODES[mode]
    with matrix_precision(tf32):
        for batch in session.sizes.batches:
            trainer = trainer_of(session, "DLRCLIP", precision, classes, batch=batch)
            for way in (FromHost(trainer), Views(trainer)):
                way.prepare(*random_batch(session, batch, classes, 1))
                for _ in range(3):
                    way.step()
                found = _profiled(session, way, 3 if session.cuda else 1)
                session.add(what="profile", mode=mode, classes=classes, batch=batch, way=way.name, **found)

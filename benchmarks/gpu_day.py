"""Everything about a GPU in a few minutes: rates, steps, evaluation, waits, losses beside the CPU's, tests, a profile.

    python benchmarks/gpu_day.py --out output/gpu_day --minutes 8

It needs no network: weights are random at real size, images are made. Parts run in the order of their importance, each
with a time of its own; what one leaves over goes to those after it. After every figure gpu_day.json is written anew, so
that a run that is stopped keeps what it has; a part that fails leaves its traceback there, and the next one begins.
`benchmarks/gpu_report.py` makes the tables of docs/PERFORMANCE.md from it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu.agreement import agreement
from benchmarks.gpu.loading import loading
from benchmarks.gpu.marked import tests
from benchmarks.gpu.passes import evaluation
from benchmarks.gpu.rates import facts
from benchmarks.gpu.session import TRIAL, OutOfTime, Session, Sizes, alarm, write_whole
from benchmarks.gpu.steps import compiled, methods, steps
from benchmarks.gpu.syncs import syncs
from benchmarks.gpu.where import where
from benchmarks.measure import machine
from benchmarks.subject import MODELS
from dassl.utils.cli import run_main

# name -> (what it does, seconds of eight minutes); in the order in which they run
PARTS: dict[str, tuple[Callable[[Session], None], float]] = {
    "facts": (facts, 20),
    "steps": (steps, 110),
    "syncs": (syncs, 25),
    "profile": (where, 25),
    "agreement": (agreement, 45),
    "evaluation": (evaluation, 35),
    "methods": (methods, 45),
    "loading": (loading, 45),
    "tests": (tests, 90),
    "compile": (compiled, 100),
}
LEAST = 3.0  # seconds below which a part is not begun


def run_part(session: Session, name: str, seconds: float) -> dict[str, Any]:
    """Run a part within its time -> how it ended."""
    start = time.monotonic()
    session.ends = start + seconds
    end: dict[str, Any] = {"status": "done"}
    try:
        with alarm(seconds):
            PARTS[name][0](session)
    except OutOfTime:
        end = {"status": "out of time"}
    except Exception as error:
        end = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
        end["traceback"] = traceback.format_exc()[-6000:]
    return {**end, "seconds": time.monotonic() - start, "allowed": seconds}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the parts and return what is in the file."""
    device = torch.device(args.device)
    begun, whole = time.monotonic(), args.minutes * 60
    settings = {**vars(args), "out": str(args.out)}
    result: dict[str, Any] = {
        "benchmark": "gpu_day",
        "machine": machine(device),
        "settings": settings,
        "parts": {name: {"status": "not begun", "rows": []} for name in args.parts},
    }
    path = args.out / "gpu_day.json"
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as train.py does
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(
            device,
            args.model,
            Sizes() if device.type == "cuda" else TRIAL,
            Path(scratch),
            lambda: write_whole(path, result),
        )
        for name in args.parts:
            left = whole - (time.monotonic() - begun)
            # What earlier parts left over is spent on this one, but for what the later ones may take.
            later = sum(PARTS[other][1] for other in args.parts[args.parts.index(name) + 1 :]) * whole / 480
            seconds = min(left, max(PARTS[name][1] * whole / 480, left - later))
            if seconds < LEAST:
                result["parts"][name]["status"] = "no time left"
                continue
            print(f"{name} (at most {seconds:.0f} s)", flush=True)
            session.rows = result["parts"][name]["rows"] = []
            result["parts"][name]["status"] = "running"
            result["parts"][name] |= run_part(session, name, seconds)
            end = result["parts"][name]
            print(f"{name}: {end['status']} after {end['seconds']:.1f} s {end.get('error', '')[:300]}", flush=True)
            session.save()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    result["seconds"] = time.monotonic() - begun
    write_whole(path, result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("output/gpu_day"), help="folder of gpu_day.json")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: " + ", ".join(PARTS))
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a trial of the script, tiny sizes"
    )
    parser.add_argument("--model", choices=MODELS, help="default: ViT-B/16, on the CPU toy")
    args = parser.parse_args(arguments)
    wanted = set(args.parts.split(","))
    if not wanted <= PARTS.keys():
        parser.error(f"Expected --parts to be some of {','.join(PARTS)} but got {args.parts!r}")
    args.parts = [name for name in PARTS if name in wanted]
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("Expected a GPU but torch finds none; --device cpu tries the script out")
    args.model = args.model or ("ViT-B/16" if args.device == "cuda" else "toy")
    result = run(args)
    return 1 if any(part["status"] == "failed" for part in result["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(run_main(main))

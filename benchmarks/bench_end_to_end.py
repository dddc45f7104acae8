"""Whole runs of train.py: DLR-CLIP with the tiny CLIP on Digits, with fresh augmentation and with kept views.

    python benchmarks/bench_end_to_end.py --epochs 10 --views 2 --json out.json

Real processes, one after the other in turn, as a user starts them; medians over the rounds count. Per run: wall-clock
seconds of the process; seconds of training; images per second of training; the share of the training time in which a
step waited for its batch, from the log; and the accuracy of the main head.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import machine, write_json
from benchmarks.tables import made_by, table
from dassl.utils.cli import run_main

ROOT = Path(__file__).resolve().parents[1]
_LINE = re.compile(r"batch \[(\d+)/(\d+)\].* time \S+ \(([\d.]+)\) data \S+ \(([\d.]+)\)")


def waiting_share(log: str) -> float:
    """Share of the steps' time spent waiting for data, from the last console line of every epoch."""
    found = [match for match in _LINE.finditer(log) if match[1] == match[2]]
    whole = sum(float(match[3]) for match in found)
    if not whole:
        raise ValueError("Expected the log to have a line at the end of each epoch but found none")
    return sum(float(match[4]) for match in found) / whole


def one_run(pairs: list[str], args: argparse.Namespace) -> dict[str, float]:
    """Runs train.py once.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--trainer", "DLRCLIP", "--config-file", args.config_file]
        command += ["--output-dir", folder, *pairs]
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        wall = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"Expected {' '.join(command)} to succeed but got:\n{done.stderr[-2000:]}")
        metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
        log = (Path(folder) / "log.txt").read_text(encoding="utf-8")
    timing = metrics["timing"]
    return {
        "wall_seconds": wall,
        "train_seconds": timing["train_seconds"],
        "images_per_second": timing["images_per_second"],
        "waiting_share": waiting_share(log),
        "accuracy": metrics["accuracy"],
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures and returns what goes into the JSON."""
    common = ["OPTIM.MAX_EPOCH", str(args.epochs), *args.pairs]
    kinds = {"fresh augmentation": common}
    if args.views:
        kinds[f"INPUT.VIEWS {args.views}"] = [*common, "INPUT.VIEWS", str(args.views)]
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for number in range(args.rounds):
        for kind in list(kinds)[:: -1 if number % 2 else 1]:
            runs[kind].append(one_run(kinds[kind], args))
    medians = {
        kind: {key: statistics.median(r[key] for r in found) for key in found[0]} for kind, found in runs.items()
    }
    return {
        "benchmark": "end_to_end",
        "medians": medians,
        "runs": runs,
        "settings": {**vars(args), "json": str(args.json)},
        "machine": {**machine(torch.device("cpu")), "threads": args.threads},
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    rows = [
        [
            kind,
            f"{m['wall_seconds']:.1f} s",
            f"{m['train_seconds']:.1f} s",
            f"{m['images_per_second']:.0f}",
            f"{100 * m['waiting_share']:.1f} %",
            f"{m['accuracy']:.1f}",
        ]
        for kind, m in result["medians"].items()
    ]
    head = ["run", "wall clock", "training", "images / s", "waiting for data", "accuracy"]
    return "\n".join([made_by(result), "", table(head, rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="configs/trainers/dlr/tiny.yaml")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--views", type=int, default=2, help="INPUT.VIEWS of the second kind of run; 0: no such run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="results file to write")
    parser.add_argument("pairs", nargs="*", help="KEY VALUE pairs for every run")
    args = parser.parse_args(arguments)
    result = run(args)
    write_json(args.json, result)
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

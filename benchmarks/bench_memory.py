"""Memory of a training step of DLR-CLIP by number of classes and memory-saving options, counted without running it.

    python benchmarks/bench_memory.py --model ViT-B/16 --classes 10 100 1000 --json out.json

The steps run on tensors without data (benchmarks/memory.py), at full size, so that this needs little memory and no time
for the steps themselves; only the constants of the class lists are computed. A row of the result:
    activations    what autograd keeps between forward and backward
    peak           the most that is alive at once within the step, temporary tensors and gradients included
    resident       the class list's constants, which lie in memory between steps
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_step import add_arguments, measure_memory
from benchmarks.measure import machine, write_json
from benchmarks.memory import constants, storage_bytes
from benchmarks.naive import Naive
from benchmarks.steps import FreshStep, Learner, NaiveStep
from benchmarks.subject import build_clip, build_network, make_batch
from benchmarks.tables import gigabytes, made_by, table
from dassl.utils.cli import run_main

OPTIONS: dict[str, dict[str, Any]] = {
    "accelerated": {},
    "accelerated, TEXT_CHUNK 100": {"text_chunk": 100},
    "accelerated, CHECKPOINTING": {"checkpointing": True},
    "accelerated, both": {"text_chunk": 100, "checkpointing": True},
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Counts and returns what goes into the JSON."""
    torch.set_num_threads(args.threads)
    clip = build_clip(args.model, args.precision, args.device, args.seed)
    rows = []
    for classes in args.classes:
        for option, arguments in OPTIONS.items():
            network = build_network(clip, classes, args.prompt_tokens, args.seed, **arguments)
            learner, naive, kept = Learner(network), Naive(network), constants(network)
            steps: list[Any] = [FreshStep(network, learner)]
            if not arguments:
                steps.insert(0, NaiveStep(naive, learner))
            parts = {
                "there": [*network.parameters(), *network.buffers(), *kept, naive.ids, naive.mask],
                "resident": storage_bytes(kept),
            }
            batch = make_batch(network, args.batch, args.seed)
            for name, memory in measure_memory(network, steps, batch, parts).items():
                title = "as published" if name == "naive" else option
                rows.append({"classes": classes, "option": title, **memory})
    return {
        "benchmark": "memory",
        "rows": rows,
        "weights": storage_bytes(clip.parameters()),
        "settings": {**vars(args), "json": str(args.json)},
        "machine": machine(torch.device(args.device)),
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    most = {row["classes"]: row for row in result["rows"] if row["option"] == "as published"}
    rows = [
        [
            row["option"],
            row["classes"],
            gigabytes(row["activations"]),
            gigabytes(row["peak"]),
            gigabytes(row["resident"]),
            f"{most[row['classes']]['activations'] / (row['activations'] + row['resident']):.1f}",
            f"{most[row['classes']]['peak'] / (row['peak'] + row['resident']):.1f}",
        ]
        for row in result["rows"]
    ]
    head = ["step", "classes", "activations", "peak", "constants", "activations less", "peak less"]
    return "\n".join([made_by(result), "", table(head, rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args(arguments)
    result = run(args)
    write_json(args.json, result)
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

"""A training step of DLR-CLIP: as published, accelerated, and accelerated on kept views, side by side in one process.

    python benchmarks/bench_step.py --model ViT-B/16 --classes 100 --batch 16 --steps 3 --json out.json

Random weights at real size, random images, names whose prompts have 13 tokens. In each round the three take the same
step from the same weights, one after the other, in turning order; medians over the rounds count. Between the steps the
machine's rate at the steps' own matrix products is measured. The loss and the gradients of the three are compared.

Keys of the JSON:
    ratio_fresh, ratio_views    median seconds as published over those of the accelerated step, without and with views
    loss_diff, grad_diff        largest difference of a loss; largest of a gradient, relative to that gradient's largest
    floor_ratio                 median seconds of the accelerated step (fresh) over those that its counted FLOPs take at
                                the measured rate; `floor_ratios` has it for all three
    peak_memory_ratio           activations that autograd keeps as published over the same plus what lies in memory
                                between steps for its sake (constants of the class list) in the accelerated step
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.flops import Product, by_part, fresh_step, naive_step, sizes_of, total, views_step
from benchmarks.measure import MatrixRate, Stopwatch, biggest, free_memory, machine, operator_times, write_json
from benchmarks.memory import constants, count_step, storage_bytes
from benchmarks.naive import Naive
from benchmarks.steps import FreshStep, Learner, NaiveStep, ViewsStep, gradients
from benchmarks.subject import MODELS, build_clip, build_network, make_batch
from benchmarks.tables import gflops, gigabytes, made_by, seconds, table
from dassl.utils.cli import run_main

_FITS = 0.6  # share of the free memory that the naive step's activations may take before classes are chunked
_CHUNK = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks of the network share."""
    parser.add_argument("--model", default="ViT-B/16", choices=MODELS)
    parser.add_argument("--prompt-tokens", type=int, default=13, help="start and end of text included")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of the frozen backbone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="results file to write")


def measure_memory(
    network: Any, steps: Sequence[Any], batch: tuple[Tensor, Tensor], parts: dict[str, Any]
) -> dict[str, Any]:
    """Counted memory of each kind of step on tensors without data."""
    images, labels = batch
    found: dict[str, Any] = {}
    for step in steps:
        step.prepare(images)
        names = list(step.inputs)

        def loss(labels: Tensor, *values: Tensor, step: Any = step, names: list[str] = names) -> Tensor:
            return step.loss(labels, **dict(zip(names, values, strict=True)))

        memory = count_step(loss, (labels, *step.inputs.values()), step.learner.parameters, parts["there"])
        found[step.name] = {
            "activations": memory.activations,
            "peak": memory.peak,
            "resident": 0 if step.name == "naive" else parts["resident"],
        }
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures and returns what goes into the JSON."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    network = build_network(
        build_clip(args.model, args.precision, args.device, args.seed), args.classes, args.prompt_tokens, args.seed
    )
    learner, naive = Learner(network), Naive(network, args.naive_passes)
    sizes = sizes_of(network, args.batch)
    products: dict[str, list[Product]] = {
        "naive": naive_step(sizes, args.naive_passes),
        "fresh": fresh_step(sizes),
        "views": views_step(sizes),
    }
    images, labels = make_batch(network, args.batch, args.seed)
    fresh, views, slow = FreshStep(network, learner), ViewsStep(network, learner), NaiveStep(naive, learner)
    kept = constants(network)
    parts = {
        "there": [*network.parameters(), *network.buffers(), *kept, naive.ids, naive.mask],
        "resident": storage_bytes(kept),
    }
    memory = measure_memory(network, [slow, fresh, views], (images, labels), parts)
    if args.naive_chunk is not None:
        slow.chunk = args.naive_chunk
    elif memory["naive"]["peak"] > _FITS * free_memory(device):
        slow.chunk = _CHUNK

    # The same weights and batch for all: compares them, and warms them up.
    steps: list[Any] = [slow, fresh, views]
    for step in steps:
        step.prepare(images)
    found = {step.name: gradients(step, labels) for step in steps}
    grad_diff = biggest(
        float((ours - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
        for name in ("fresh", "views")
        for ours, wanted in zip(found[name], found["naive"], strict=True)
    )
    rate = MatrixRate(device, network.clip.dtype, [p for part in products.values() for p in part])
    repeats = 20 if device.type == "cuda" else 1
    times: dict[str, list[float]] = {step.name: [] for step in steps}
    losses: dict[str, list[float]] = {step.name: [] for step in steps}
    for number in range(args.steps):
        images, labels = make_batch(network, args.batch, args.seed + 1 + number)
        order = steps[number % 3 :] + steps[: number % 3]
        for position, step in enumerate(order):
            step.prepare(images)
            watch = Stopwatch(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            if position < 2:
                with learner.taken_back():
                    losses[step.name].append(step.step(labels, watch))
            else:
                losses[step.name].append(step.step(labels, watch))
            times[step.name].append(watch.seconds)
            if device.type == "cuda":
                memory[step.name]["allocated"] = torch.cuda.max_memory_allocated(device)
        rate.measure(repeats)

    def profiled(step: Any) -> list[dict[str, Any]]:
        step.prepare(images)
        with learner.taken_back():
            return operator_times(lambda: step.step(labels, Stopwatch(device)), device)

    medians = {name: statistics.median(values) for name, values in times.items()}
    floors = {name: rate.seconds(part) for name, part in products.items()}
    ours = memory["fresh"]["activations"] + memory["fresh"]["resident"]
    return {
        "benchmark": "step",
        "ratio_fresh": medians["naive"] / medians["fresh"],
        "ratio_views": medians["naive"] / medians["views"],
        "loss_diff": biggest(
            abs(a - b) for name in ("fresh", "views") for a, b in zip(losses[name], losses["naive"], strict=True)
        ),
        "grad_diff": grad_diff,
        "floor_ratio": medians["fresh"] / floors["fresh"],
        "floor_ratios": {name: medians[name] / floors[name] for name in medians},
        "peak_memory_ratio": memory["naive"]["activations"] / ours,
        "seconds": medians,
        "all_seconds": times,
        "floor_seconds": floors,
        "rate": {name: total(part) / floors[name] for name, part in products.items()},
        "flops": {name: by_part(part) for name, part in products.items()},
        "flop_ratio_fresh": total(products["naive"]) / total(products["fresh"]),
        "flop_ratio_views": total(products["naive"]) / total(products["views"]),
        "memory": memory,
        "naive_chunk": slow.chunk,
        "losses": losses,
        "profile": {step.name: profiled(step) for step in (fresh, views)},
        "settings": {**vars(args), "json": str(args.json)},
        "machine": machine(device),
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    names = {"naive": "as published", "fresh": "fresh augmentation", "views": "kept views"}
    rows = []
    for name, title in names.items():
        memory = result["memory"][name]
        flops = sum(result["flops"][name].values())
        rows.append(
            [
                title,
                seconds(result["seconds"][name]),
                f"{result['seconds']['naive'] / result['seconds'][name]:.2f}",
                gflops(flops),
                f"{sum(result['flops']['naive'].values()) / flops:.2f}",
                seconds(result["floor_seconds"][name]),
                f"{result['floor_ratios'][name]:.2f}",
                gigabytes(memory["activations"]),
                gigabytes(memory["peak"]),
            ]
        )
    head = ["step", "time", "times faster", "GFLOP", "times fewer", "floor", "time / floor", "activations", "peak"]
    lines = [made_by(result), "", table(head, rows), ""]
    parts = [[part, gflops(f), f"{f / result['rate']['fresh']:.3f} s"] for part, f in result["flops"]["fresh"].items()]
    lines += [table(["part of the step (fresh)", "GFLOP", "floor"], parts), ""]
    lines += [
        f"Largest difference of a loss: {result['loss_diff']:.1e}; of a gradient, relative: {result['grad_diff']:.1e}. "
        f"Activations as published : accelerated (and its {gigabytes(result['memory']['fresh']['resident'])} of "
        f"constants) = {result['peak_memory_ratio']:.1f}."
    ]
    for name in ("fresh", "views"):
        shares = [f"{row['operator'].removeprefix('aten::')} {row['share']:.0%}" for row in result["profile"][name]]
        lines += ["", f"Where the time goes ({names[name]}): {', '.join(shares[:7])}."]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="rounds; medians count")
    parser.add_argument("--naive-passes", type=int, default=3, choices=(2, 3), help="image passes as published")
    parser.add_argument("--naive-chunk", type=int, help="classes at once as published; 0: all (default: what fits)")
    args = parser.parse_args(arguments)
    if args.steps < 1:
        parser.error(f"Expected --steps to be at least 1 but got {args.steps}")
    result = run(args)
    write_json(args.json, result)
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

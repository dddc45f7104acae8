"""An evaluation pass of DLR-CLIP over random images: as published and accelerated, side by side in one process.

    python benchmarks/bench_eval.py --model ViT-B/16 --classes 100 --images 256 --json out.json

As published, every test batch runs the image encoder for each branch and encodes every prompt at 77 tokens. The
accelerated pass encodes the text once; `features` and `hidden` are the same pass where zero-shot CLIP's features of the
images, or these and what enters the first adapted block, are kept from an earlier pass. The four take turns batch by
batch (of 100 images, as published); the text's time is in the first batch of each.

Keys of the JSON:
    ratio, ratio_features, ratio_hidden    images per second over those as published
    images_per_second                      of the four
    logit_diff                             largest difference of a logit of any head to the published computation
    floor_ratio                            seconds of the accelerated pass over those of its counted FLOPs
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_step import add_arguments
from benchmarks.flops import Product, by_part, naive_eval, our_eval, sizes_of, total
from benchmarks.measure import MatrixRate, Stopwatch, biggest, machine, write_json
from benchmarks.naive import Naive
from benchmarks.subject import build_clip, build_network, make_batch
from benchmarks.tables import gflops, made_by, seconds, table
from dassl.utils.cli import run_main

NAMES = {
    "naive": "as published",
    "ours": "accelerated",
    "features": "... zero-shot features kept",
    "hidden": "... and what enters the first adapted block",
}


def use_refiner(network: Any) -> None:
    """At its initial zero the refiner's last layer would hide what comes before it."""
    torch.nn.init.normal_(network.learner.glr.head.weight, std=0.01)


def forget_text(network: Any) -> None:
    """The next call encodes the text again, as in a pass of its own: any change of a learnt value has that effect."""
    with torch.no_grad():
        next(network.learner.cma.parameters()).add_(0.0)


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures and returns what goes into the JSON."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    clip = build_clip(args.model, args.precision, args.device, args.seed)
    network: Any = build_network(clip, args.classes, args.prompt_tokens, args.seed).eval()
    use_refiner(network)
    naive = Naive(network)
    sizes = sizes_of(network, min(args.batch, args.images))
    products: dict[str, list[Product]] = {
        "naive": naive_eval(sizes, args.images),
        "ours": our_eval(sizes, args.images),
        "features": our_eval(sizes, args.images, plain=False),
        "hidden": our_eval(sizes, args.images, prefix=False, plain=False),
    }
    rate = MatrixRate(device, clip.dtype, [p for part in products.values() for p in part])
    times = {name: [0.0] for name in NAMES}
    differences = []
    for number, done in enumerate(range(0, args.images, args.batch)):
        images, _ = make_batch(network, min(args.batch, args.images - done), args.seed + number)
        kept = network.frozen_part(images)
        calls: dict[str, Callable[[], dict[str, Tensor]]] = {
            "naive": lambda: naive.evaluate(images),  # noqa: B023
            "ours": lambda: network(images),  # noqa: B023
            "features": lambda: network(images, features=kept.features),  # noqa: B023
            "hidden": lambda: network(features=kept.features, hidden=kept.hidden),  # noqa: B023
        }
        if number == 0 and device.type == "cuda":
            for call in calls.values():  # starts the kernels
                call()
        names = list(NAMES)[number % 4 :] + list(NAMES)[: number % 4]
        heads: dict[str, dict[str, Tensor]] = {}
        for name in names:
            if number == 0:
                forget_text(network)
            watch = Stopwatch(device)
            with watch:
                heads[name] = calls[name]()
            times[name].append(watch.seconds)
        differences += [
            float((heads[name][head] - heads["naive"][head]).abs().max())
            for name in ("ours", "features", "hidden")
            for head in heads["naive"]
        ]
        rate.measure(20 if device.type == "cuda" else 1)
    speed = {name: args.images / sum(values) for name, values in times.items()}
    floors = {name: rate.seconds(part) for name, part in products.items()}
    return {
        "benchmark": "eval",
        "ratio": speed["ours"] / speed["naive"],
        "ratio_features": speed["features"] / speed["naive"],
        "ratio_hidden": speed["hidden"] / speed["naive"],
        "flop_ratio": {name: total(products["naive"]) / total(part) for name, part in products.items()},
        "images_per_second": speed,
        "logit_diff": biggest(differences),
        "floor_ratio": sum(times["ours"]) / floors["ours"],
        "floor_ratios": {name: sum(times[name]) / floors[name] for name in NAMES},
        "seconds": {name: sum(values) for name, values in times.items()},
        "floor_seconds": floors,
        "flops": {name: by_part(part) for name, part in products.items()},
        "settings": {**vars(args), "json": str(args.json)},
        "machine": machine(device),
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    rows = []
    for name, title in NAMES.items():
        speed = result["images_per_second"]
        rows.append(
            [
                title,
                f"{speed[name]:.2f}",
                f"{speed[name] / speed['naive']:.2f}",
                gflops(sum(result["flops"][name].values())),
                f"{result['flop_ratio'][name]:.2f}",
                seconds(result["floor_seconds"][name]),
                f"{result['floor_ratios'][name]:.2f}",
            ]
        )
    head = ["pass", "images / s", "times faster", "GFLOP", "times fewer", "floor", "time / floor"]
    difference = f"Largest difference of a logit (they are of the order of 100): {result['logit_diff']:.1e}."
    return "\n".join([made_by(result), "", table(head, rows), "", difference])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=100, help="images in a test batch")
    args = parser.parse_args(arguments)
    if min(args.images, args.batch) < 1:
        parser.error(f"Expected --images and --batch to be at least 1 but got {args.images} and {args.batch}")
    result = run(args)
    write_json(args.json, result)
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

"""Kernels of a training step of DLR-CLIP, counted: as published, accelerated, and accelerated on kept views.

    python benchmarks/kernels.py --output output/benchmarks/kernels.json --document docs/PERFORMANCE.md

A program launches a GPU's kernels one by one. Where they are short, as with small batches in bf16, their number decides
how long a step takes. They are counted on the CPU, in bf16, in a CLIP as deep as ViT-B/16 but narrow, so that no GPU is
needed: each operator that computes something is one kernel. The optimizer is left out: it has few, and the same.
`sharing always` is the accelerated step whose text branch computes the tokens that all prompts begin with once, however
few that saves; see SHARING_COST in trainers/clip/text.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import machine, write_json
from benchmarks.memory import constants
from benchmarks.naive import Naive
from benchmarks.report import write_section
from benchmarks.steps import FreshStep, Learner, NaiveStep, ViewsStep
from benchmarks.subject import build_clip, build_network, make_batch
from benchmarks.tables import made_by, table
from dassl.utils.cli import run_main
from trainers.clip import text

BEGIN = "<!-- kernels: begin (written by benchmarks/kernels.py) -->"
END = "<!-- kernels: end -->"
NO_KERNEL = ("empty", "new_empty", "detach", "lift_fresh", "_unsafe_view", "_local_scalar_dense")
ALWAYS = "accelerated, sharing always"
TITLES = {"naive": "as published", "fresh": "accelerated", "views": "accelerated, kept views"}


class KernelCount(TorchDispatchMode):
    """Context manager that counts operators that compute something; views and bare allocations do not.

    Attributes:
        count: their number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += not (func.is_view or name.startswith(NO_KERNEL))
        return func(*args, **(kwargs or {}))


def count_kernels(step: Any, images: Tensor, labels: Tensor) -> tuple[int, int]:
    """Return the kernels of a step's forward pass and of its backward pass."""
    step.prepare(images)
    with KernelCount() as forward:
        loss = step.loss(labels, **step.inputs)
    with KernelCount() as backward:
        torch.autograd.grad(loss, step.learner.parameters, allow_unused=True)
    return forward.count, backward.count


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Counts and returns what goes into the JSON."""
    clip = build_clip("narrow", "bf16")
    rows = []
    for classes in args.classes:
        for always in (False, True):
            cost = 0 if always else text.SHARING_COST["cuda"]
            with mock.patch.dict(text.SHARING_COST, {"cpu": cost}):
                network = build_network(clip, classes)
                learner = Learner(network)
                steps: list[Any] = [FreshStep(network, learner)]
                if not always:
                    steps = [NaiveStep(Naive(network), learner), *steps, ViewsStep(network, learner)]
                images, labels = make_batch(network, args.batch, seed=0)
                constants(network)  # makes them: no step computes them again
                for step in steps:
                    forward, backward = count_kernels(step, images, labels)
                    title = ALWAYS if always else TITLES[step.name]
                    rows.append({"classes": classes, "step": title, "forward": forward, "backward": backward})
    settings = {key: str(value) for key, value in vars(args).items()}
    return {"benchmark": "kernels", "rows": rows, "settings": settings, "machine": machine(torch.device("cpu"))}


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    rows = []
    for classes in dict.fromkeys(row["classes"] for row in result["rows"]):
        mine = [row for row in result["rows"] if row["classes"] == classes]
        published = mine[0]["forward"] + mine[0]["backward"]
        for row in mine:
            whole = row["forward"] + row["backward"]
            rows.append([row["step"], classes, row["forward"], row["backward"], whole, f"{whole / published:.2f}"])
    head = ["step", "classes", "forward", "backward", "both", "of the published number"]
    return "\n".join([made_by(result), "", table(head, rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--output", type=Path, help="results file to write")
    parser.add_argument("--document", type=Path, help="Markdown file whose section is replaced")
    args = parser.parse_args(arguments)
    result = run(args)
    write_json(args.output, result)
    shown = markdown(result)
    print(shown)
    write_section(args.document, shown, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

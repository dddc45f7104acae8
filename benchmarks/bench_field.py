"""Training steps of methods beside DLR-CLIP: as published, ours, and ours on kept views, side by side.

    python benchmarks/bench_field.py --classes 100 --threads 2 --rounds 3 --output out.json
    python benchmarks/bench_field.py --methods CoOp,KgCoOp --output out.json

Random weights at real size, random images, the published settings and batch size of each method (its vit_b16.yaml),
fp32. Of several methods, each has a process of its own, so that its memory is free again for the next. There, loss and
gradients of the three are first compared on ten classes and two images, without dropout; a difference is an error. Then
in each round they take the same step from the same weights, one after the other, in turning order; medians over the
rounds count. CPU seconds of all threads count, so that other jobs on the machine matter less; wall seconds are in the
file, too. The file is written anew after each method; rows of other methods in it stay. A method that fails, for want
of memory, say, is told, and the others go on; the command then ends with 1.

Memory at ViT-B/16's size, 100 classes and published batches, counted on tensors without data, with 2.5 GB for the
process itself: 11.5 GB for CLIPLoRA, 9.2 GB for TwoStageFS-1, 6.8 GB for KgCoOp, 6.3 GB or less for each other. The
step as published needs most of it.

Keys of a row of the JSON:
    ratio_fresh, ratio_views    median CPU seconds as published over those of our step, without and with kept views;
                                None: the method keeps none
    flop_ratio_fresh, ...       the same of the FLOPs of matrix products and attention, as torch counts them
    loss_diff, grad_diff        largest difference of a loss in the rounds (None with dropout), and of a gradient in the
                                comparison before, relative to that gradient's largest
    peak                        the most bytes that the process held, nearly always in the step as published
    elapsed                     seconds from the building of CLIP to the last round
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import CPUWatch, Stopwatch, biggest, peak_memory
from benchmarks.published import METHODS, Published, trainer_of
from benchmarks.side_by_side import add_arguments, chosen_methods, measure_rows
from benchmarks.steps import FreshStep, Learner, gradients
from benchmarks.subject import MODELS, build_clip, class_names, make_batch
from benchmarks.tables import gigabytes, made_by, seconds, table
from dassl.engine import TRAINER_REGISTRY
from dassl.engine.step import Steps
from dassl.utils.cli import run_main
from trainers.app.configuration import default_cfg
from trainers.base.losses import total
from trainers.configs import configs_of
from trainers.features import FrozenPart

_TOLERANCE = 1e-3  # of a gradient, relative to its largest; of a loss, absolute
_KINDS = ("naive", "fresh", "views")
BEGIN = "<!-- field: begin (written by benchmarks/bench_field.py) -->"
END = "<!-- field: end -->"


class MethodStep(FreshStep):
    """Our step of a trainer's method.

    Args:
        trainer: ours.
        published: what says which inputs a step takes.
        learner: what is learnt.
    """

    def __init__(self, trainer: Any, published: Published, learner: Learner) -> None:
        super().__init__(trainer.network, learner)
        self.trainer, self.published = trainer, published

    def prepare(self, images: Tensor) -> None:
        super().prepare(self.published.inputs(images))

    def loss(self, labels: Tensor, **inputs: Any) -> Tensor:
        (given,) = inputs.values()
        return total(self.trainer.loss(self.trainer.run(given, labels), labels))

    def backward(self, loss: Tensor) -> None:
        self.trainer.model_backward(loss)


class MethodViewsStep(MethodStep):
    """Our step on what the frozen part of the image encoder has made of the images, which is kept in RAM."""

    name = "views"

    def prepare(self, images: Tensor) -> None:
        part = self.trainer._frozen_part(images)
        self.kept = {name: value for name, value in zip(part._fields, part, strict=True) if value is not None}
        self.rows = torch.arange(len(images))

    def batch(self) -> dict[str, Any]:
        return {"part": FrozenPart(**{name: value[self.rows] for name, value in self.kept.items()})}


class PublishedStep(MethodStep):
    """The step as published."""

    name = "naive"

    def loss(self, labels: Tensor, **inputs: Any) -> Tensor:
        return self.published.loss(inputs["images"], labels)

    def backward(self, loss: Tensor) -> None:
        self.published.backward(loss)


def published_cfg(name: str) -> Any:
    """Return the configuration of a row: the vit_b16.yaml of its trainer, and its own keys."""
    cfg = default_cfg()
    cfg.merge_from_file(str(configs_of(trainer_of(name))["vit_b16"]))
    cfg.merge_from_list(list(METHODS[name].keys))
    return cfg


def build_trainer_of(name: str, clip: Any, classes: int, cfg: Any, seed: int = 0) -> Any:
    """Return a trainer without data, loop and optimizer, at the start of training: its network, its losses."""
    method: Any = TRAINER_REGISTRY.get(name)
    given = cfg

    class Bare(method):
        """The method without its engine but for what a step needs, in fp32."""

        settings = method.read_settings(cfg)

        def __init__(self) -> None:
            Steps.__init__(self)
            self.cfg, self.device = given, clip.device
            self.epoch, self.batch_idx, self.num_batches = 0, 0, 1
            self._set_up_precision("fp32")

        def class_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels)

    torch.manual_seed(seed)
    trainer = Bare()
    trainer.network = trainer.build_network(clip, class_names(classes), ["a photo of a {}."]).train()
    return trainer


def scatter(learner: Any) -> None:
    """Move what is learnt off its start, so that nothing is compared where it is zero."""
    with torch.no_grad():
        for p in learner.parameters():
            if p.ndim:
                p.add_(0.02 * torch.randn(p.shape))


def build_steps(name: str, clip: Any, classes: int, cfg: Any) -> list[Any]:
    """Return the steps of a method: as published, ours, and on kept views where it has them."""
    trainer = build_trainer_of(trainer_of(name), clip, classes, cfg)
    METHODS[name].begin(trainer)
    learner = Learner(trainer.network)
    trainer.register_model("learner", trainer.network.learner, learner.optimizer)
    published = METHODS[name](trainer.network, trainer.settings)
    kinds = [PublishedStep, MethodStep] if trainer.no_views else [PublishedStep, MethodStep, MethodViewsStep]
    return [kind(trainer, published, learner) for kind in kinds]


def compare(name: str, clip: Any, cfg: Any, classes: int = 10, batch: int = 2) -> dict[str, float]:
    """Compare loss and gradients of a method's steps on a few classes and images, without dropout.

    Returns:
        The largest difference of a loss, and of a gradient relative to that gradient's largest.

    Raises:
        RuntimeError: one of them is too large.
    """
    steps = build_steps(name, clip, classes, cfg)
    for module in steps[0].network.learner.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    scatter(steps[0].network.learner)
    images, labels = make_batch(steps[0].network, batch, 1)
    losses, grads = [], []
    for step in steps:
        step.prepare(images)
        with step.learner.taken_back():
            losses.append(step.step(labels, Stopwatch(labels.device)))
        grads.append(gradients(step, labels))
    found = {
        "loss": biggest(abs(loss - losses[0]) for loss in losses[1:]),
        "gradient": biggest(
            float((own - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
            for ours in grads[1:]
            for own, wanted in zip(ours, grads[0], strict=True)
        ),
    }
    if not max(found.values()) <= _TOLERANCE:
        raise RuntimeError(f"Expected {name} to have the losses and gradients as published but they differ by {found}")
    return found


def measure(name: str, model: str, classes: int, rounds: int, batch: int | None = None) -> dict[str, Any]:
    """Measure a method's steps in this process and return its row."""
    start = time.perf_counter()
    clip, cfg = build_clip(model), published_cfg(name)
    differences = compare(name, clip, cfg)
    steps = build_steps(name, clip, classes, cfg)
    size = batch or cfg.DATALOADER.TRAIN_X.BATCH_SIZE
    times: dict[str, list[float]] = {step.name: [] for step in steps}
    wall: dict[str, list[float]] = {step.name: [] for step in steps}
    losses: dict[str, list[float]] = {step.name: [] for step in steps}
    flops: dict[str, int] = {}
    for number in range(rounds):
        images, labels = make_batch(steps[0].network, size, 1 + number)
        for step in steps[number % len(steps) :] + steps[: number % len(steps)]:
            step.prepare(images)
            watch = CPUWatch(clip.device)
            if number == 0:  # off the clock where counting would take a share of the time that can be seen
                counter, quick = FlopCounterMode(display=False), step.name == "views"
                with step.learner.taken_back(), counter:
                    loss = step.step(labels, CPUWatch(clip.device) if quick else watch)
                flops[step.name] = counter.get_total_flops()
            if number > 0 or quick:
                with step.learner.taken_back():
                    loss = step.step(labels, watch)
            losses[step.name].append(loss)
            times[step.name].append(watch.cpu)
            wall[step.name].append(watch.seconds)
    dropout = getattr(steps[0].network.learner, "dropout", 0) > 0
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    return {
        "method": name,
        "batch": size,
        "seconds": medians,
        "all_seconds": times,
        "wall_seconds": wall,
        "flops": flops,
        **{f"ratio_{kind}": medians["naive"] / medians[kind] if kind in medians else None for kind in _KINDS[1:]},
        **{f"flop_ratio_{kind}": flops["naive"] / flops[kind] if kind in flops else None for kind in _KINDS[1:]},
        "loss_diff": None
        if dropout
        else biggest(abs(a - b) for own in losses.values() for a, b in zip(own, losses["naive"], strict=True)),
        "grad_diff": differences["gradient"],
        "peak": peak_memory(),
        "elapsed": time.perf_counter() - start,
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""

    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    rows = [
        [
            f"{row['method']}, batch {row['batch']}",
            *(seconds(row["seconds"][kind]) if kind in row["seconds"] else "-" for kind in _KINDS),
            *(ratio(row[f"{what}_{kind}"]) for what in ("ratio", "flop_ratio") for kind in _KINDS[1:]),
            gigabytes(row["peak"]),
        ]
        for row in result["rows"]
    ]
    head = [
        "CPU seconds of a step",
        "as published",
        "ours",
        "kept views",
        "times faster",
        "kept views",
        "times fewer FLOPs",
        "kept views",
        "memory of the process",
    ]
    losses = biggest(0.0 if row["loss_diff"] is None else row["loss_diff"] for row in result["rows"])
    grads = biggest(row["grad_diff"] for row in result["rows"])
    told = f"Largest difference of a loss: {losses:.1e}; of a gradient, relative: {grads:.1e}."
    return "\n".join([made_by(result), "", table(head, rows), "", told])


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, METHODS)
    parser.add_argument("--model", default="ViT-B/16", choices=MODELS)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch", type=int, help="images in a batch (default: as published)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="medians count")
    args = parser.parse_args(arguments)
    args.methods = chosen_methods(parser, args.methods, METHODS)
    if args.rounds < 1:
        parser.error(f"Expected --rounds to be at least 1 but got {args.rounds}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = parse_args(given)
    torch.set_num_threads(args.threads)
    return measure_rows(
        args,
        given,
        benchmark="field",
        script=__file__,
        order=METHODS,
        measure=lambda name: measure(name, args.model, args.classes, args.rounds, args.batch),
        markdown=markdown,
        marks=(BEGIN, END),
    )


if __name__ == "__main__":
    sys.exit(run_main(main))

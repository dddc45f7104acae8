"""Estimate how long the common protocols take, from measured training steps.

    python benchmarks/bench_field.py --classes 10 --rounds 1 --output out/field_10.json
    python benchmarks/bench_field.py --classes 100 --output out/field_100.json
    python benchmarks/bench_step.py --classes 10 --json out/step_10.json
    python benchmarks/bench_step.py --classes 100 --json out/step_100.json
    python benchmarks/protocol_hours.py out/field_*.json out/step_*.json --document docs/PERFORMANCE.md

The time of a step is taken to be linear in the number of classes, between and beyond two measured numbers. Where a
source has another batch for a dataset, what does not grow with the classes is taken to grow with the batch. CPU seconds
of all threads are shared out evenly among the cores (bench_step.py gives wall seconds). Epochs, batches and steps are
those of vit_b16.yaml, with what the sources set otherwise (published/settings.csv). Each training is followed by the
encoding of the dataset's test images by a whole ViT-B/16, whose time is measured here. With kept views, ten views of
each training image are encoded once. Reading images is left out; input_pipeline.py measures it. The last row is what
methods on frozen features have in common: the encoding of each dataset's test images and of ten views of each training
image.

    --gpu FILE   gpu_day.json of benchmarks/gpu_day.py: a column for its steps in bf16, where the method was measured
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import machine
from benchmarks.published import METHODS, trainer_of
from benchmarks.report import write_section
from benchmarks.subject import build_clip
from benchmarks.tables import made_by, table
from dassl.engine import TRAINER_REGISTRY
from dassl.utils import InputError
from dassl.utils.cli import fail, run_main
from scripts.lib.dataset_sources import SOURCES
from scripts.lib.methods import registered_name
from scripts.lib.published import AVERAGES
from scripts.lib.published_settings import pairs_for, read_settings
from trainers.app.configuration import default_cfg
from trainers.configs import configs_of

ELEVEN = AVERAGES["average11"]
SHOTS, SEEDS, VIEWS = (1, 2, 4, 8, 16), 3, 10
STAGES = {"TwoStageFS-1": 0.6, "TwoStageFS-2": 0.4}  # shares of the steps of one method, in rows of their own
BEGIN = "<!-- protocol hours: begin (written by benchmarks/protocol_hours.py) -->"
END = "<!-- protocol hours: end -->"
DLR = "DLRCLIP"
ENCODING = "frozen features, encoding"


class Part(NamedTuple):
    """Hold a training of a protocol.

    Attributes:
        protocol: few-shot or base2new, whose settings count.
        dataset: stem of a file in configs/datasets.
        shots: labeled images of each class.
        times: how often it is done.
        share: of the classes that is trained on.
    """

    protocol: str
    dataset: str
    shots: int
    times: int
    share: float


PROTOCOLS = {
    "11 datasets, 1 to 16 shots, 3 seeds": [
        Part("few-shot", name, shots, SEEDS, 1.0) for name in ELEVEN for shots in SHOTS
    ],
    "base-to-new, 11 datasets, 3 seeds": [Part("base2new", name, 16, SEEDS, 0.5) for name in ELEVEN],
    "ImageNet, 16 shots, 1 seed": [Part("few-shot", "imagenet", 16, 1, 1.0)],
}


class Step:
    """The time of a step as a line through two measured numbers of classes.

    Args:
        seconds: number of classes -> seconds.
        least: slope that it has at least: a step on fresh images takes as much longer with more classes as one on kept
            views, whatever the noise of its images' pass.

    Raises:
        InputError: there are fewer than two.
    """

    def __init__(self, seconds: Mapping[int, float], least: float = 0.0) -> None:
        if len(seconds) < 2:
            raise InputError(f"Expected steps with two numbers of classes but got {sorted(seconds)}")
        low, high = min(seconds), max(seconds)
        self.slope = max(least, (seconds[high] - seconds[low]) / (high - low))
        self.base = max(0.0, seconds[low] - self.slope * low)

    def __call__(self, classes: float, times: float = 1.0) -> float:
        """Return the seconds of a step.

        Args:
            classes: their number.
            times: the batch over the measured one; what does not grow with the classes grows with the batch.
        """
        return self.base * times + self.slope * classes


class Length(NamedTuple):
    """Hold how long a method trains: steps for each shot, or where these are 0 epochs of batches.

    `drop_last`: whether an epoch leaves out its last, smaller batch.
    """

    per_shot: int
    epochs: int
    batch: int
    drop_last: bool


@functools.cache
def length_of(name: str, pairs: tuple[str, ...]) -> Length:
    """Return how long DLR-CLIP or a row of METHODS trains with vit_b16.yaml and KEY VALUE pairs."""
    cfg = default_cfg()
    cfg.merge_from_file(str(configs_of(trainer_of(name))["vit_b16"]))
    cfg.merge_from_list([*(METHODS[name].keys if name in METHODS else ()), *pairs])
    own = cfg.TRAINER.get(cfg.TRAINER.NAME.upper(), {})
    drop_last = bool(TRAINER_REGISTRY.get(cfg.TRAINER.NAME).drop_last)
    return Length(int(own.get("N_ITERS", 0)), int(cfg.OPTIM.MAX_EPOCH), cfg.DATALOADER.TRAIN_X.BATCH_SIZE, drop_last)


def steps_of(length: Length, images: int, shots: int) -> int:
    """Return the steps of a training on that many images, `shots` of each class."""
    batches = images // length.batch if length.drop_last else -(-images // length.batch)
    return length.per_shot * shots if length.per_shot else length.epochs * max(1, batches)


def hours(name: str, parts: Sequence[Part], step: Step, image: float, views: bool) -> float:
    """Return the hours of a protocol.

    Args:
        name: DLRCLIP, or a row of METHODS.
        parts: its trainings.
        step: seconds by number of classes.
        image: seconds that encoding an image takes.
        views: whether VIEWS views of each training image are encoded before.
    """
    settings, total = read_settings(), 0.0
    for part in parts:
        length = length_of(name, pairs_for(settings, trainer_of(name), part.protocol, part.shots, part.dataset))
        all_classes, _, _, tests = SOURCES[registered_name(part.dataset)].counts
        classes = all_classes * part.share
        images = int(classes * part.shots)
        one = step(classes, length.batch / length_of(name, ()).batch)
        seconds = steps_of(length, images, part.shots) * one * STAGES.get(name, 1.0)
        seconds += tests * image + (VIEWS * images * image if views else 0.0)
        total += part.times * seconds
    return total / 3600


def encoding_hours(parts: Sequence[Part], image: float) -> float:
    """Return the hours that encoding takes: test images once, and VIEWS views of the training images of each training.

    Args:
        parts: the trainings of a protocol.
        image: seconds that encoding an image takes.
    """
    counts = {part.dataset: SOURCES[registered_name(part.dataset)].counts for part in parts}
    images = sum(tests for *_, tests in counts.values())
    images += sum(part.times * VIEWS * int(counts[part.dataset][0] * part.share * part.shots) for part in parts)
    return images * image / 3600


def image_seconds(threads: int, images: int = 16, rounds: int = 3) -> float:
    """Measure the CPU seconds that encoding an image takes with ViT-B/16, shared out among the threads."""
    clip, taken = build_clip("ViT-B/16"), []
    batch = torch.randn(images, 3, 224, 224)
    with torch.no_grad():
        for _ in range(rounds + 1):
            start = time.process_time()
            clip.encode_image(batch)
            taken.append((time.process_time() - start) / threads / images)
    return statistics.median(taken[1:])


def read_steps(paths: Sequence[Path]) -> tuple[dict[tuple[str, str], dict[int, float]], int]:
    """Return (row, kind) -> number of classes -> seconds of the benchmarks' files, and their number of threads."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    threads = set()
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        cores, classes = int(result["settings"]["threads"]), int(result["settings"]["classes"])
        threads.add(cores)
        own = {"method": DLR, "seconds": result.get("seconds"), "cores": 1}  # bench_step.py: wall seconds
        for row in result.get("rows", [own]):
            for kind in ("fresh", "views"):
                if kind in row["seconds"]:
                    share = row["seconds"][kind] / row.get("cores", cores)
                    found.setdefault((row["method"], kind), {})[classes] = share
    if len(threads) != 1:
        raise InputError(f"Expected files that were measured with one number of threads but got {sorted(threads)}")
    return found, threads.pop()


def read_gpu(path: Path | None) -> tuple[dict[str, dict[int, float]], float, str]:
    """Return row -> number of classes -> seconds of a GPU day in bf16, seconds of an image, and the GPU's name."""
    if path is None:
        return {}, 0.0, ""
    day = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, dict[int, float]] = {}
    for row in [*day["parts"]["methods"]["rows"], *day["parts"]["steps"]["rows"]]:
        small = row["mode"] == "bf16" and row["batch"] <= 32 and "seconds" in row  # the smallest that was measured
        if small and row.get("way", "fresh") == "fresh":
            found.setdefault(row.get("trainer", DLR), {})[int(row["classes"])] = float(row["seconds"])
    rates = [row["images_per_second"]["features"] for row in day["parts"]["evaluation"]["rows"]]
    return found, 1 / min(rates), str(day["machine"]["gpu"])


def report(args: argparse.Namespace) -> str:
    """Return Markdown of the estimates.

    Raises:
        InputError: a method was measured with one number of classes only.
    """
    found, threads = read_steps(args.files)
    image = image_seconds(threads) if args.image_seconds is None else args.image_seconds
    gpu, gpu_image, gpu_name = read_gpu(args.gpu)
    head = ["hours"]
    for protocol in PROTOCOLS:
        head += [f"{protocol}: {threads} cores", "kept views", *([gpu_name] if gpu else [])]
    rows = []
    for name in (DLR, *METHODS):
        if (name, "fresh") not in found or "+" in name:  # an option's recipe has other epochs than the method's
            continue
        row = [name]
        for parts in PROTOCOLS.values():
            kept = Step(found[name, "views"]) if (name, "views") in found else None
            fresh = Step(found[name, "fresh"], kept.slope if kept else 0.0)
            row.append(f"{hours(name, parts, fresh, image, False):,.1f}")
            row.append(f"{hours(name, parts, kept, image, True):,.1f}" if kept else "-")
            if gpu:
                row.append(f"{hours(name, parts, Step(gpu[name]), gpu_image, False):,.1f}" if name in gpu else "-")
        rows.append(row)
    encoding = [ENCODING]
    for parts in PROTOCOLS.values():
        encoding += ["-", f"{encoding_hours(parts, image):,.1f}"]
        encoding += [f"{encoding_hours(parts, gpu_image):,.1f}"] if gpu else []
    rows.append(encoding)
    told = f"Encoding an image: {1000 * image:.0f} ms" + (f", on the GPU {1000 * gpu_image:.2f} ms." if gpu else ".")
    return "\n".join([made_by({"machine": machine(torch.device("cpu"))}), "", table(head, rows), "", told])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("files", type=Path, nargs="+", help="results of bench_field.py, two numbers of classes")
    parser.add_argument("--gpu", type=Path, help="gpu_day.json")
    parser.add_argument("--image-seconds", type=float, help="of encoding an image (default: it is measured)")
    parser.add_argument("--document", type=Path, help="Markdown file whose section is replaced")
    args = parser.parse_args(argv)
    try:
        text = report(args)
        print(text)
        write_section(args.document, text, BEGIN, END)
    except (InputError, OSError, ValueError, KeyError) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

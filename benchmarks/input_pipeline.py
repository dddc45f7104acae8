"""Images per second from JPEG files: torchvision's plain pipeline beside ours, decoded whole, reduced, and kept.

    python benchmarks/input_pipeline.py --workers 1,2 --appetite 1177 --output out.json --document docs/PERFORMANCE.md

Photos are scikit-learn's two sample images, enlarged and cut to size, in a folder for each class, quality 90. Each way
has the same transforms (random crop, flip, normalization), batches of 64, and goes once through the files before it is
timed, so that processes are started and files are in the system's memory. Medians of --rounds, ways in turn.

Keys of a row of the JSON:
    cpu_ms              CPU milliseconds of an image, in one process
    images_per_second   by the number of loading processes
    changed, largest    share of the values of test images that differ from those decoded whole, and by how much, of 255
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import machine, write_json
from benchmarks.report import write_section
from benchmarks.tables import made_by, table
from dassl.config import get_cfg_default
from dassl.data import DatasetWrapper
from dassl.data.data_manager import build_data_loader
from dassl.data.datasets import Datum
from dassl.data.transforms import build_transform
from dassl.utils.cli import run_main

SIZES = ((500, 375), (2560, 1708), (4032, 3024))
WAYS = ("torchvision", "whole", "reduced", "kept")
BATCH = 64
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
BEGIN = "<!-- input pipeline: begin (written by benchmarks/input_pipeline.py) -->"
END = "<!-- input pipeline: end -->"


def write_photos(folder: Path, size: tuple[int, int], count: int) -> list[Datum]:
    """Write photos of a size into two folders; each is another part of a sample image."""
    found = []
    for number in range(count):
        label = number % 2
        photo = Image.fromarray(load_sample_images().images[label])
        left, top = number % 7 * 10, number % 5 * 8
        part = photo.crop((left, top, left + 560, top + round(560 * size[1] / size[0])))
        path = folder / f"class{label}" / f"{number:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        found.append(Datum(str(path), label, 0, path.parent.name))
    return found


def config_of(way: str, workers: int) -> Any:
    """Return the configuration of one of our ways."""
    cfg = get_cfg_default()
    cfg.INPUT.INTERPOLATION, cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD = "bicubic", MEAN, STD
    cfg.INPUT.TRANSFORMS = ("random_resized_crop", "random_flip", "normalize")
    cfg.INPUT.DECODE = "reduced" if way == "reduced" else "full"
    cfg.DATALOADER.NUM_WORKERS = workers
    cfg.DATALOADER.CACHE_IMAGES = 4096 if way == "kept" else 0
    return cfg


def loader_of(way: str, folder: Path, items: Sequence[Datum], workers: int) -> Iterable[Any]:
    """Return the loader of training batches of one of WAYS."""
    if way != "torchvision":
        cfg = config_of(way, workers)
        return build_data_loader(
            cfg, "RandomSampler", items, BATCH, tfm=build_transform(cfg, is_train=True), seed=1, drop_last=False
        )
    steps = [
        transforms.RandomResizedCrop(224, scale=(0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    images = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    return DataLoader(images, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def one_pass(loader: Iterable[Any], clock: Callable[[], float]) -> float:
    """Return the seconds of a pass."""
    start = clock()
    for _ in loader:
        pass
    return clock() - start


def changes(items: Sequence[Datum]) -> tuple[float, float]:
    """Return the share of the values of test images that reduced decoding changes, and the largest change, of 255."""
    shown = []
    for way in ("whole", "reduced"):
        cfg = config_of(way, 0)
        cfg.INPUT.TRANSFORMS = ()
        images = DatasetWrapper(cfg, items[:4], build_transform(cfg, is_train=False))
        shown.append(torch.stack([images[number]["img"] for number in range(len(images))]) * 255)
    difference = (shown[0] - shown[1]).abs().round()
    return float((difference > 0).float().mean()), float(difference.max())


def measure(args: argparse.Namespace, size: tuple[int, int], folder: Path) -> list[dict[str, Any]]:
    """Return a row for each way on photos of a size."""
    items = write_photos(folder, size, args.files)
    loaders = {(way, n): loader_of(way, folder, items, n) for way in WAYS for n in (0, *args.workers)}
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in loaders}
    for number in range(args.rounds + 1):
        for (way, workers), loader in loaders.items():
            seconds = one_pass(loader, time.perf_counter if workers else time.process_time)
            if number:
                taken[way, workers].append(seconds)
    changed, largest = changes(items)
    return [
        {
            "size": f"{size[0]} x {size[1]}",
            "way": way,
            "cpu_ms": 1000 * statistics.median(taken[way, 0]) / args.files,
            "images_per_second": {str(n): args.files / statistics.median(taken[way, n]) for n in args.workers},
            "changed": changed if way == "reduced" else 0.0,
            "largest": largest if way == "reduced" else 0.0,
        }
        for way in WAYS
    ]


def report(found: dict[str, Any]) -> str:
    """Return Markdown of the result."""
    counts = list(found["rows"][0]["images_per_second"])
    appetite = found["appetite"]
    names = {
        "torchvision": "torchvision's",
        "whole": "ours",
        "reduced": "ours, `INPUT.DECODE reduced`",
        "kept": "ours, `DATALOADER.CACHE_IMAGES`",
    }
    head = ["photos", "pipeline", "CPU ms / image", *(f"images / s, {n} processes" for n in counts)]
    head += [f"cores for {appetite:,.0f} images / s", "values changed", "by at most"]
    rows = []
    for row in found["rows"]:
        reduced = row["way"] == "reduced"
        rows.append(
            [
                row["size"],
                names[row["way"]],
                f"{row['cpu_ms']:.1f}",
                *(f"{rate:.0f}" for rate in row["images_per_second"].values()),
                f"{row['cpu_ms'] * appetite / 1000:.1f}",
                f"{100 * row['changed']:.0f} %" if reduced else "",
                f"{row['largest']:.0f} of 255" if reduced else "",
            ]
        )
    return f"{made_by(found)}\n\n{table(head, rows)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--files", type=int, default=64, help="photos of each size (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="passes that are timed (default: 5)")
    parser.add_argument(
        "--workers", type=lambda text: [int(word) for word in text.split(",")], default=[1, 2], help="default: 1,2"
    )
    parser.add_argument("--appetite", type=float, default=1177.0, help="images a second that a training step takes")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--document", type=Path, help="Markdown file whose section is replaced")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(args, size, Path(folder))
    found = {"machine": machine(torch.device("cpu")), "appetite": args.appetite, "rows": rows}
    write_json(args.output, found)
    text = report(found)
    print(text)
    write_section(args.document, text, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

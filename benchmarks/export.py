"""Size, latency and exactness of exported files: five methods, on the tiny CLIP and on ViT-B/32 with random weights.

    python benchmarks/export.py --output result.json

Each method learns for an epoch on made-up images, which says nothing of its accuracy: what is measured is the file.
A cell has the median time of 20 runs on one image, the size, and the largest difference of a probability.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import machine, write_json
from benchmarks.tables import made_by, table
from dassl.utils.cli import run_main
from datasets.digits import CLASSES
from trainers import FewShotClassifier
from trainers.api.export.measures import ExportReport
from trainers.clip.backbones import resolve_backbone

METHODS = ("DLRCLIP", "LinearProbe", "CLIPLoRA", "MaPLe", "TipAdapterF")
BACKBONES = ("tiny", "ViT-B/32")
HEAD = ("backbone", "method", "PyTorch ms", "ONNX", "ONNX half", "ONNX int8", "TorchScript")


def weights_of(backbone: str, folder: Path) -> str | None:
    """The path for MODEL.BACKBONE.WEIGHTS, with random weights in the file; None for the tiny CLIP's own."""
    if backbone == "tiny":
        return None
    torch.manual_seed(0)
    arch: Any = resolve_backbone(backbone).arch
    model = open_clip.CLIP(**arch)
    with torch.no_grad():
        model.logit_scale.fill_(4.6052)  # exp = 100, as in OpenAI's weights
    path = folder / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, str(path))
    return str(path)


def draw_images(each: int) -> tuple[list[Image.Image], list[str]]:
    """Random patches, and their classes."""
    rng = np.random.default_rng(0)
    images, labels = [], []
    for name in CLASSES:  # words that the tiny CLIP knows
        for _ in range(each):
            coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            images.append(Image.fromarray(coarse).resize((240, 240), Image.Resampling.BICUBIC))
            labels.append(name)
    return images, labels


def measure(backbone: str, method: str, folder: Path) -> list[dict[str, Any]]:
    """Trains and exports a method, and returns what was measured of each file."""
    images, labels = draw_images(2)
    classifier = FewShotClassifier(
        method, backbone, weights=weights_of(backbone, folder), calibration=None, device="cpu",
        settings={"OPTIM.MAX_EPOCH": 1, "DATALOADER.TRAIN_X.BATCH_SIZE": 4, "DATALOADER.NUM_WORKERS": 0},
    ).fit(images, labels)  # fmt: skip
    reports: list[ExportReport] = [
        classifier.export(folder / "model.onnx", images=images[:8], half=True, int8=True),
        classifier.export(folder / "model.pt", "torchscript", images=images[:8]),
    ]
    rows = [reports[0].rows[0], *(row for report in reports for row in report.rows[1:])]
    return [
        {"backbone": backbone, "method": method, "file": row.name, "bytes": row.size, "seconds": row.latency,
         "difference": row.difference}
        for row in rows
    ]  # fmt: skip


def cell(row: dict[str, Any]) -> str:
    """Latency, size and largest difference of a file."""
    return f"{1000 * row['seconds']:.1f} ms, {row['bytes'] / 1e6:.1f} MB, {row['difference']:.0e}"


def as_table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = []
    for one in range(0, len(result["rows"]), 5):
        plain, *files = result["rows"][one : one + 5]
        rows.append([plain["backbone"], plain["method"], f"{1000 * plain['seconds']:.1f}", *map(cell, files)])
    return f"{table(HEAD, rows)}\n\n{made_by(result)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"machine": machine(torch.device("cpu")), "rows": []}
    for backbone in args.backbones:
        for method in args.methods:
            with tempfile.TemporaryDirectory() as folder:
                result["rows"] += measure(backbone, method, Path(folder))
            print(f"{backbone} {method}: done", file=sys.stderr, flush=True)
    write_json(args.output, result)
    print(as_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

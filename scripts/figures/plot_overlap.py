"""Overlap and feature variance of a dataset's images, without and with adapters of IMO or IMODINO; the histograms.

    python scripts/figures/plot_overlap.py output/shapesgeneric/IMO/tiny_full/seed1 --datasets Digits Shapes

Prints a Markdown table: overlap (shared area of the histograms of cosine similarity of same-class and different-class
pairs; 1 = no separation) and variance (mean over dimensions, in thousandths), before -> after. With several adapters,
e.g. one per seed, a last row per dataset has their mean. `--out` gets a figure per dataset of the first adapters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dassl.data import DatasetWrapper
from dassl.data.datasets import DATASET_REGISTRY, build_dataset
from dassl.data.transforms import build_transform
from dassl.utils import InputError, did_you_mean
from dassl.utils.cli import fail, run_main
from scripts.lib.imo import config
from trainers.clip import CLIP, load_clip
from trainers.features.corrected import load_adapters, read_recipe
from trainers.imo import Measures, draw_histograms, measure
from trainers.modules.overlap_adapters import IMOAdapters


def loader_of(name: str, root: str, parts: Sequence[str], clip: CLIP) -> Any:
    """Return a loader of the images of some parts of a dataset together, as at test time."""
    cfg = config(clip, name, root)
    dataset = build_dataset(cfg)
    for part in parts:
        if not getattr(dataset, part):
            raise InputError(f"Expected {name} to have {part} images but it has none")
    items = [item for part in parts for item in getattr(dataset, part)]
    return torch.utils.data.DataLoader(
        DatasetWrapper(cfg, items, transform=build_transform(cfg, False)), batch_size=100
    )


@torch.no_grad()
def measure_all(clip: CLIP, every: Sequence[IMOAdapters], loader: Any) -> list[Measures]:
    """Return the measures of CLIP's own features, then of those with each of the adapters."""
    features: list[list[torch.Tensor]] = [[] for _ in range(1 + len(every))]
    labels = []
    for batch in loader:
        images = batch["img"].to(clip.device)
        features[0].append(clip.encode_image(images).float())
        for found, adapters in zip(features[1:], every, strict=True):
            found.append(adapters.encode(clip, images))
        labels.append(batch["label"].to(clip.device))
    return [measure(torch.cat(found), torch.cat(labels)) for found in features]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapters", nargs="+", help="files of adapters, or output folders of IMO or IMODINO")
    parser.add_argument("--datasets", nargs="+", default=["Digits", "Shapes"], help="names of datasets")
    parser.add_argument("--root", default="", help="folder that holds the datasets")
    parts = ("train_x", "val", "test")
    parser.add_argument("--part", nargs="+", choices=parts, default=["test"], help="several are taken together")
    parser.add_argument("--weights", default="", help="MODEL.BACKBONE.WEIGHTS")
    parser.add_argument("--out", type=Path, help="folder for the figures and overlap.json")
    args = parser.parse_args(argv)
    known = DATASET_REGISTRY.registered_names()
    for name in args.datasets:
        if name not in known:
            parser.error(f"Expected a dataset ({', '.join(known)}) but got {name!r}{did_you_mean(name, known)}")
    return args


def run(args: argparse.Namespace) -> str:
    """Return the table; write figures and overlap.json to --out."""
    clip = load_clip(read_recipe(args.adapters[0])["backbone"], args.weights or None)
    every = [load_adapters(path, clip) for path in args.adapters]
    rows: list[list[str]] = []
    record: dict[str, Any] = {"part": args.part, "adapters": list(args.adapters), "datasets": {}}
    for name in args.datasets:
        before, *after = measure_all(clip, every, loader_of(name, args.root, args.part, clip))

        def row(who: str, overlap: float, variance: float, name: str = name, before: Measures = before) -> None:
            shown = f"{1000 * before.variance:.3f} -> {1000 * variance:.3f}"
            rows.append([name, who, f"{before.overlap:.4f} -> {overlap:.4f}", shown])

        for path, found in zip(args.adapters, after, strict=True):
            row(path, found.overlap, found.variance)
        if len(after) > 1:
            row("mean", statistics.fmean(m.overlap for m in after), statistics.fmean(m.variance for m in after))
        record["datasets"][name] = {
            "before": {"overlap": before.overlap, "variance": before.variance},
            "after": [{"overlap": m.overlap, "variance": m.variance} for m in after],
        }
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            title = f"{name}, {' and '.join(args.part)} images"
            draw_histograms(before, after[0], title).savefig(args.out / f"{name.lower()}.png", dpi=120)
    if args.out:
        (args.out / "overlap.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return tabulate(rows, ["dataset", "adapters", "overlap", "variance x 1000"], tablefmt="pipe", disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

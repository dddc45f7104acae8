"""Measure IMO's and IMODINO's adapters on sets that they were not trained on: overlap, and Tip-Adapter++'s gain.

    python scripts/measure_imo.py IMO=RUN_OF_SEED_1,RUN_OF_SEED_2,... IMODINO=...

Two Markdown tables. The first: overlap and variance of the test images without and with the adapters. The second: test
accuracy of Tip-Adapter and of Tip-Adapter++ with the same picks, and the mean gain over numbers of shots with its 95 %
interval over the seeds (Student's t). The adapters of place i go with seed i. A source is trained on with k shots (keys
are features as at test time; alpha and beta are searched on validation images) and evaluated on its own test images and
on its shifted sets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.data import DatasetWrapper
from dassl.data.datasets import build_dataset
from dassl.data.transforms import build_transform
from dassl.utils.cli import fail, run_main
from scripts.lib.imo import config
from scripts.lib.tables import mean_and_band
from trainers.clip import CLIP, load_clip, templates_for, zeroshot_weights
from trainers.features.corrected import load_adapters, read_recipe
from trainers.imo import measure
from trainers.modules.overlap_adapters import IMOAdapters
from trainers.tip_adapter.search import GRIDS, best_point, grid_accuracy, tip_values
from trainers.tip_adapter.tip import tip_logits

SOURCES = {"Digits": ("Digits",), "Shapes": ("Shapes", "ShapesV2", "ShapesSketch", "ShapesA", "ShapesR")}
# Tip-Adapter's grid for both methods, so that only the features differ.
ALPHAS = GRIDS["tip"].alpha._replace(end=tip_values("").alpha_end).values()
BETAS = GRIDS["tip"].beta._replace(end=tip_values("").beta_end).values()


class Known:
    """Features of images by path; each image is encoded once, by CLIP ("") and with each of the named adapters."""

    def __init__(self, clip: CLIP, every: Mapping[str, IMOAdapters]) -> None:
        self.clip, self.every = clip, every
        self.by_path: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def of(self, cfg: Any, items: Sequence[Any] | None) -> tuple[dict[str, Tensor], Tensor]:
        """Return normalized features [n, E] by name, and labels [n]."""
        assert items is not None  # the sets of SOURCES have what is asked for
        new = [item for item in items if item.impath not in self.by_path]
        if new:
            data = DatasetWrapper(cfg, new, transform=build_transform(cfg, is_train=False))
            for batch in torch.utils.data.DataLoader(data, batch_size=100):
                images = batch["img"].to(self.clip.device)
                plain = torch.nn.functional.normalize(self.clip.encode_image(images).float(), dim=-1)
                found = [plain, *(adapters.encode(self.clip, images) for adapters in self.every.values())]
                for path, *features in zip(batch["impath"], *found, strict=True):
                    self.by_path[path] = features
        stacked = [torch.stack(part) for part in zip(*(self.by_path[item.impath] for item in items), strict=True)]
        labels = torch.tensor([item.label for item in items], device=self.clip.device)
        return dict(zip(["", *self.every], stacked, strict=True)), labels


def interval(values: Sequence[float]) -> str:
    """Return the mean as text, with half the width of its 95 % interval where there are several values."""
    mean, half = mean_and_band(values)
    return f"{mean:+.2f} ± {half:.2f}" if len(values) > 1 else f"{mean:+.2f}"


def accuracies(
    known: Known, weights: Tensor, source: str, which: str, args: Any, shots: int, seed: int
) -> dict[str, Any]:
    """Return test accuracies (percent) by set and method.

    The method "" is Tip-Adapter; `which` is Tip-Adapter++ with these adapters.
    """
    clip = known.clip
    cfg = config(clip, source, args.root, shots, seed)
    dataset = build_dataset(cfg)
    (keys, key_labels), (val, val_labels) = known.of(cfg, dataset.train_x), known.of(cfg, dataset.val)
    scale = clip.logit_scale
    out: dict[str, Any] = {}
    for name in ("", which):
        affinity = val[name] @ keys[name].t()
        grid = grid_accuracy(scale * val[""] @ weights.t(), affinity, key_labels, val_labels, ALPHAS, BETAS)
        point = best_point(grid, ALPHAS, BETAS)
        for target in SOURCES[source]:
            tested = build_dataset(config(clip, target, args.root)) if target != source else dataset
            test, labels = known.of(cfg, tested.test)
            zero = scale * test[""] @ weights.t()
            logits = tip_logits(test[name], zero, keys[name], key_labels, point.alpha, point.beta)
            columns = getattr(tested, "class_indices", None)
            logits = logits if columns is None else logits[:, columns]
            out.setdefault(target, {})[name] = 100.0 * float((logits.argmax(dim=1) == labels).double().mean())
    return out


def run(args: argparse.Namespace) -> str:
    """Return both tables; write the numbers behind them to --out."""
    groups = {name: paths.split(",") for name, _, paths in (group.partition("=") for group in args.groups)}
    first = next(iter(groups.values()))[0]
    clip = load_clip(read_recipe(first)["backbone"], args.weights or None)
    every = {f"{g}/{i}": load_adapters(p, clip) for g, paths in groups.items() for i, p in enumerate(paths, start=1)}
    known = Known(clip, every)
    measured: list[list[str]] = []
    gained: list[list[str]] = []
    record: dict[str, Any] = {"overlap": {}, "accuracy": []}
    for source in args.sources:
        dataset = build_dataset(config(clip, source, args.root))
        features, labels = known.of(config(clip, source, args.root), dataset.test)
        found = {name: measure(values, labels) for name, values in features.items()}
        record["overlap"][source] = {name: [m.overlap, m.variance] for name, m in found.items()}
        for name, m in found.items():
            row = [source, name or "CLIP", f"{m.overlap:.4f}", f"{1000 * m.variance:.3f}"]
            measured.append(row)
        with torch.no_grad():
            weights = zeroshot_weights(clip, dataset.classnames, templates_for(source, "")).float()
        for group, paths in groups.items():
            runs = {
                (shots, seed): accuracies(known, weights, source, f"{group}/{seed}", args, shots, seed)
                for shots in args.shots
                for seed in range(1, len(paths) + 1)
            }
            for target in SOURCES[source]:
                pairs = {key: (value[target][""], value[target][f"{group}/{key[1]}"]) for key, value in runs.items()}
                record["accuracy"] += [[group, source, target, *key, *pair] for key, pair in pairs.items()]
                cells = []
                for shots in args.shots:
                    chosen = [pair for key, pair in pairs.items() if key[0] == shots]
                    tip, pp = (statistics.fmean(pair[i] for pair in chosen) for i in (0, 1))
                    cells.append(f"{tip:.1f} -> {pp:.1f}")
                by_seed = [
                    statistics.fmean(pair[1] - pair[0] for key, pair in pairs.items() if key[1] == seed)
                    for seed in range(1, len(paths) + 1)
                ]
                gained.append([group, f"{source} to {target}", *cells, interval(by_seed)])
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    how = {"tablefmt": "pipe", "disable_numparse": True}
    one = tabulate(measured, ["test images of", "adapters", "overlap", "variance x 1000"], **how)
    two = tabulate(gained, ["adapters", "trained, tested", *(f"{k} shots" for k in args.shots), "mean gain"], **how)
    return f"{one}\n\n{two}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="+", metavar="NAME=RUN,RUN,...", help="runs of IMO or IMODINO, one per seed")
    parser.add_argument("--sources", nargs="+", choices=tuple(SOURCES), default=list(SOURCES))
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="labeled images per class")
    parser.add_argument("--root", default="", help="folder that holds the datasets")
    parser.add_argument("--weights", default="", help="MODEL.BACKBONE.WEIGHTS")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers behind the tables")
    args = parser.parse_args(argv)
    if not all("=" in group for group in args.groups):
        parser.error(f"Expected NAME=RUN,RUN,... but got {' '.join(args.groups)}")
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

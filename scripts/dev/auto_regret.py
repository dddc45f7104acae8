r"""Measure how well the automatic choice of a method chooses: its regret, and whether its estimate holds.

    python scripts/dev/auto_regret.py --output results.csv
    python scripts/dev/auto_regret.py --output dev.csv --part val --seeds 101 102 103 104 105

The first has the reported numbers: test images, seeds 1 to 5. The second is for development.

For each dataset, number of shots and seed, the k training images of each class go through the same cross-validation as
`FewShotClassifier(method="auto")`. Then every candidate is trained on all of them, and classifies the part's images.
The regret is the accuracy of the best candidate on these images, which nobody can know, minus that of the chosen one.
A run that is in the file already is not made again.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dassl.data.datasets import DATASET_REGISTRY, Datum
from dassl.utils.cli import run_main
from datasets.splits import read_split
from trainers.api.auto import CANDIDATES, add_learning_curve, compare
from trainers.api.report import estimate
from trainers.api.runs import VALIDATION_SHARE, Runner, apart, draw_validation, logits_of
from trainers.app.configuration import default_cfg
from trainers.clip.load import shared_clips
from trainers.features import remembered_features

DATASETS = ("Digits", "Shapes", "DigitsNonsense", "ShapesNonsense")
FIELDS = ("dataset", "shots", "seed", "chosen", "accuracy", "best", "best_accuracy", "regret", "low", "high", "covered")


def images(dataset: str, shots: int, seed: int, part: str) -> tuple[list[Datum], list[Datum]]:
    """Return the k training images of each class, and the images to measure on."""
    cfg = default_cfg()
    cfg.merge_from_list(["DATASET.NAME", dataset, "DATASET.NUM_SHOTS", shots, "SEED", seed])
    found: Any = DATASET_REGISTRY.get(dataset)(cfg)
    whole = read_split(Path(found.dataset_dir) / found.split_name, found.image_dir)
    names = {item.label: item.classname for item in found.train_x}
    other = [Datum(item.impath, item.label, classname=names[item.label]) for item in getattr(whole, part)]
    return found.train_x, other


def one(dataset: str, shots: int, seed: int, part: str, share: float) -> dict[str, Any]:
    """Return the row of one run."""
    items, others = images(dataset, shots, seed, part)
    runner = Runner("tiny", seed=seed)
    with tempfile.TemporaryDirectory() as folder, apart(seed, warnings=False), shared_clips(), remembered_features():
        comparison = compare(runner, items, folder, share)
        add_learning_curve(runner, comparison, items, folder, share)
        found = {}
        for choice in CANDIDATES:
            parts = (*draw_validation(items, share, seed), others)
            logits, labels = logits_of(runner.train(runner.configure_quietly(choice, folder), parts))
            found[choice.shown] = 100 * float((logits.argmax(dim=1) == labels).double().mean())
    chosen = comparison.chosen.choice.shown
    best = max(found, key=lambda name: found[name])
    _, low, high = estimate(comparison)
    covered = low <= found[chosen] <= high
    row = (
        dataset,
        shots,
        seed,
        chosen,
        found[chosen],
        best,
        found[best],
        found[best] - found[chosen],
        low,
        high,
        covered,
    )
    cv = {f"cv {one.choice.shown}": one.accuracy for one in comparison.scores}
    return {**dict(zip(FIELDS, row, strict=True)), **found, **cv}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="CSV file")
    parser.add_argument("--datasets", nargs="+", default=DATASETS)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--part", choices=("val", "test"), default="test", help="images to measure on")
    parser.add_argument("--validation-fraction", type=float, default=VALIDATION_SHARE)
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    if args.output.exists():
        with args.output.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    names = [f"{prefix}{choice.shown}" for prefix in ("", "cv ") for choice in CANDIDATES]
    for dataset in args.datasets:
        for shots in args.shots:
            for seed in args.seeds:
                if any((row["dataset"], row["shots"], row["seed"]) == (dataset, str(shots), str(seed)) for row in rows):
                    continue
                row = one(dataset, shots, seed, args.part, args.validation_fraction)
                rows.append({name: str(value) for name, value in row.items()})
                print({name: row[name] for name in FIELDS}, flush=True)
                with args.output.open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, [*FIELDS, *names], restval="")
                    writer.writeheader()
                    writer.writerows(rows)
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        for shots in dict.fromkeys(row["shots"] for row in rows):
            mine = [row for row in rows if (row["dataset"], row["shots"]) == (dataset, shots)]
            if mine:
                regret = statistics.fmean(float(row["regret"]) for row in mine)
                print(f"{dataset:16s} {shots:>2s} shots: regret {regret:.2f}, covered {_share(mine):.0f} %")
    print(f"all: regret {statistics.fmean(float(row['regret']) for row in rows):.2f}, covered {_share(rows):.0f} %")
    return 0


def _share(rows: Sequence[dict[str, Any]]) -> float:
    return 100 * statistics.fmean(row["covered"] == "True" for row in rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run_main(main))

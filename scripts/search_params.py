"""alpha and beta (and gamma) of Tip-Adapter++ or Tip-X++ searched once for several seeds, on validation images.

    python scripts/search_params.py output/shapesgeneric/IMO/tiny_full/seed1 --dataset Digits --seeds 1,2,3 \
        --augment-epochs 10

For each number of shots: the validation accuracy of every point of the grid is averaged over the seeds, and the best
point is used for all of them. Prints a Markdown table; the test accuracy at that point is only looked at afterwards.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.data.datasets import DATASET_REGISTRY
from dassl.engine import TRAINER_REGISTRY, build_trainer
from dassl.utils import InputError, did_you_mean, set_random_seed
from dassl.utils.cli import fail, run_main
from trainers.app.configuration import default_cfg
from trainers.configs import CONFIGS
from trainers.features.corrected import read_recipe
from trainers.tip_adapter.search import GridPoint, best_point

FOLDERS = {"TipAdapterPP": "tip_adapter_pp", "TipXPP": "tipx_pp"}
FILES = {"tiny": "tiny.yaml", "RN50": "rn50.yaml"}  # other backbones: vit_b16.yaml


class SeedResult(NamedTuple):
    """The result of one seed: validation accuracy on the grid, the grid, and the trainer with its cache filled."""

    accuracy: torch.Tensor  # [betas, gammas, alphas]
    axes: dict[str, list[float]]
    trainer: Any


def fill_cache(args: argparse.Namespace, shots: int, seed: int, folder: str) -> SeedResult:
    """Return the trainer of one seed with its cache, and the grid on its validation images.

    Raises:
        InputError: there are no validation images.
    """
    cfg = default_cfg()
    backbone = read_recipe(args.model)["backbone"]
    configs = CONFIGS / "trainers" / FOLDERS[args.trainer]
    cfg.merge_from_file(str(args.config_file or configs / FILES.get(backbone, "vit_b16.yaml")))
    cfg.merge_from_list(["DATASET.NAME", args.dataset, "DATASET.ROOT", args.root, "DATASET.NUM_SHOTS", shots])
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", backbone, "MODEL.IMO_WEIGHTS", args.model, "SEED", seed])
    cfg.merge_from_list(["OUTPUT_DIR", folder, "VERBOSE", False, "TRAINER.NAME", args.trainer])
    cfg.merge_from_list([f"TRAINER.{TRAINER_REGISTRY.get(args.trainer).node_name}.VIEWS", args.augment_epochs])
    cfg.merge_from_list([part for pair in args.set for part in pair])
    cfg.freeze()
    set_random_seed(seed)
    trainer = build_trainer(cfg)
    known = trainer.validation_features()
    if isinstance(known, str):
        raise InputError(f"Expected validation images to search on but {args.dataset} has none to offer: {known}")
    with torch.no_grad():
        trainer.prepare(trainer.train_features.all())
        return SeedResult(trainer.grid(*known), trainer.axes(), trainer)


@torch.no_grad()
def test_accuracy(trainer: Any, point: GridPoint) -> dict[str, float]:
    """Return the accuracy (percent) of zero-shot CLIP and of the method on the test images."""
    learner = trainer.network.learner
    for name in ("alpha", "beta", "gamma"):
        if hasattr(learner, name):
            getattr(learner, name).fill_(getattr(point, name))
    known = trainer.test_loader.all()
    heads = trainer.model_heads(known.values[0])
    return {
        head: 100.0 * float((logits.argmax(dim=1) == known.labels).double().mean()) for head, logits in heads.items()
    }


def run(args: argparse.Namespace) -> str:
    """Return the Markdown table, with a row per number of shots."""
    rows = []
    for shots in args.shots:
        with tempfile.TemporaryDirectory() as folder:
            results = [fill_cache(args, shots, seed, folder) for seed in args.seeds]
            mean = torch.stack([result.accuracy for result in results]).mean(dim=0)
            point = best_point(mean, **results[0].axes, first=results[0].trainer.search.first)
            tested = [test_accuracy(result.trainer, point) for result in results]
        main = results[0].trainer.main_head
        values = [one[main] for one in tested]
        spread = f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
        gamma = [f"{point.gamma:.3g}"] if "gammas" in results[0].axes else []
        clip = f"{statistics.fmean(one['clip'] for one in tested):.2f}"
        rows.append(
            [shots, f"{point.alpha:.3g}", f"{point.beta:.3g}", *gamma]
            + [f"{point.accuracy:.2f}", clip, f"{statistics.fmean(values):.2f}{spread}"]
        )
    names = [
        "shots",
        "alpha",
        "beta",
        *(["gamma"] if args.trainer == "TipXPP" else []),
        "val %",
        "clip test %",
        "test %",
    ]
    return tabulate(rows, names, tablefmt="pipe", disable_numparse=True)


def numbers(text: str) -> list[int]:
    """Convert "1,2,3" to [1, 2, 3]."""
    return [int(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="adapters: a file that IMO or IMODINO saved, or the folder of such a run")
    parser.add_argument("--dataset", required=True, help="name of the dataset")
    parser.add_argument("--root", default="", help="folder that holds the datasets")
    parser.add_argument("--seeds", type=numbers, default=[1, 2, 3], help="separated by commas (default: 1,2,3)")
    parser.add_argument("--shots", type=numbers, default=[1, 2, 4, 8, 16], help="the same (default: 1,2,4,8,16)")
    parser.add_argument("--augment-epochs", type=int, default=10, help="views of each training image (default: 10)")
    parser.add_argument("--trainer", choices=tuple(FOLDERS), default="TipAdapterPP")
    parser.add_argument("--config-file", help="YAML of the trainer (default: that of the adapters' backbone)")
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="change a setting"
    )
    args = parser.parse_args(argv)
    known = DATASET_REGISTRY.registered_names()
    if args.dataset not in known:
        hint = did_you_mean(args.dataset, known)
        parser.error(f"Expected --dataset to be one of {', '.join(known)} but got {args.dataset!r}{hint}")
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

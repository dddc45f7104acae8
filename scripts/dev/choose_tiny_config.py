r"""Choose the values of configs/trainers/*/tiny.yaml that differ from the published ones.

    python scripts/dev/choose_tiny_config.py
    python scripts/dev/choose_tiny_config.py --config configs/trainers/mma/tiny.yaml \\
        --grid '{"OPTIM.LR": [0.0015, 0.015]}'
    python scripts/dev/choose_tiny_config.py --config configs/trainers/dlr/tiny_plus.yaml --dataset Shapes --unseen \\
        --grid '{"TRAINER.DLRCLIP.MIXTURE.PROTO_PATCH": [true, false]}' --seeds 101 102

Trains on Digits with every setting of the grid and measures all heads on the WHOLE validation part of the Digits split
(359 images; the few-shot training images and all test images lie outside it). With --unseen the few-shot validation
images do not count: methods that are fitted to these know them. The best mean of the method's main head over shots and
seeds wins. Test images are never loaded. The default is DLR-CLIP with the grid below.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dassl.data.data_manager import build_data_loader
from dassl.data.transforms import build_transform
from dassl.engine import build_trainer
from dassl.utils import set_random_seed
from dassl.utils.cli import run_main
from datasets.splits import read_split
from trainers.app.configuration import default_cfg

CONFIG = "configs/trainers/dlr/tiny.yaml"
GRID = {"OPTIM.LR": [0.001, 0.002, 0.004], "TRAINER.DLRCLIP.SCALE": [0.3, 1.0], "TRAINER.DLRCLIP.START": [1]}


def validation_accuracy(
    settings: dict[str, Any], shots: int, seed: int, config: str, name: str = "Digits", unseen: bool = False
) -> dict[str, float]:
    """Train with `settings`; return the accuracy (percent) of each head, the main head first.

    The accuracy is that on the whole validation part, or without the few-shot validation images, which is handed to
    `model_heads` at once, for the transductive methods.

    Args:
        settings: keys and values.
        shots, seed: of the run.
        config: the configuration's file.
        name: of the dataset, Digits or Shapes.
        unseen: whether the few-shot validation images are left out.
    """
    cfg = default_cfg()
    cfg.merge_from_file(config)
    cfg.merge_from_list([x for pair in settings.items() for x in pair])
    cfg.merge_from_list(["DATASET.NAME", name, "DATASET.NUM_SHOTS", shots, "SEED", seed, "TEST.NO_TEST", True])
    with tempfile.TemporaryDirectory() as folder:
        cfg.OUTPUT_DIR = folder
        cfg.freeze()
        set_random_seed(seed)
        trainer: Any = build_trainer(cfg)
        trainer.train()
        dataset = trainer.dm.dataset
        whole = read_split(Path(dataset.dataset_dir) / dataset.split_name, dataset.image_dir).val
        if unseen:
            seen = {item.impath for item in dataset.val or ()}
            whole = [item for item in whole if item.impath not in seen]
        test_view = build_transform(cfg, is_train=False)
        loader = build_data_loader(cfg, data_source=whole, batch_size=len(whole), tfm=test_view, is_train=False)
        trainer.set_model_mode("eval")
        with torch.no_grad():
            images, labels = trainer.parse_batch_test(next(iter(loader)))
            heads = trainer.model_heads(images)
        hits = {head: 100 * float((logits.argmax(dim=1) == labels).float().mean()) for head, logits in heads.items()}
    return {trainer.main_head: hits.pop(trainer.main_head), **hits}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", type=json.loads, default=GRID, help="JSON object: config key -> list of values")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--dataset", default="Digits", choices=("Digits", "Shapes"))
    parser.add_argument("--unseen", action="store_true", help="leave the few-shot validation images out")
    args = parser.parse_args(argv)
    results: list[tuple[float, dict[str, Any]]] = []
    for values in itertools.product(*args.grid.values()):
        settings = dict(zip(args.grid, values, strict=True))
        runs = {
            (shots, seed): validation_accuracy(settings, shots, seed, args.config, args.dataset, args.unseen)
            for shots in args.shots
            for seed in args.seeds
        }
        mean = statistics.fmean(next(iter(run.values())) for run in runs.values())
        results.append((mean, settings))
        print(f"{mean:.2f}  {settings}", flush=True)
        for (shots, seed), run in runs.items():
            heads = "  ".join(f"{head} {value:.1f}" for head, value in run.items())
            print(f"       {shots} shots, seed {seed}: {heads}", flush=True)
    print("chosen:", max(results, key=lambda result: result[0]))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

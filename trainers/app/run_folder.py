"""The output folder of a run: which one it is, and what is left of a run that never started."""

from __future__ import annotations

import argparse
from pathlib import Path

from dassl.config import CfgNode, plain_config, read_yaml
from dassl.engine.reliability.lock import is_locked
from dassl.utils import place_name


def choose_output_dir(cfg: CfgNode, args: argparse.Namespace) -> Path:
    """Choose the folder of a run whose command names none: `output/<dataset>/<trainer>/<config>_<k>shots/seed<s>[-n]`.

    For one's own images, <dataset> is the name of their folder or CSV file.

    Of `seed<s>`, `seed<s>-2`, `seed<s>-3`, ... the first is taken that is free, or that holds a run of this very
    configuration which was cut short (it is resumed there). A finished run is never written over, nor is one that is
    going on.
    """
    dataset = Path(args.dataset_config_file).stem if args.dataset_config_file else cfg.DATASET.NAME.lower()
    dataset = dataset_folder(dataset, cfg.DATASET.ROOT)
    if cfg.DATASET.SUBSAMPLE_CLASSES != "all":
        dataset += f"_{cfg.DATASET.SUBSAMPLE_CLASSES}"
    config = Path(args.config_file).stem if args.config_file else "default"
    if args.eval_only:
        parent = Path("output", "evaluation", cfg.TRAINER.NAME, f"{config}_{_shots(cfg.DATASET.NUM_SHOTS)}", dataset)
    else:
        parent = parent_folder(Path("output"), dataset, cfg.TRAINER.NAME, config, cfg.DATASET.NUM_SHOTS)
    number, folder = 1, parent / f"seed{cfg.SEED}"
    while folder.exists() and not (_is_cut_short(folder, cfg) and not args.eval_only and not is_locked(folder)):
        number += 1
        folder = parent / f"seed{cfg.SEED}-{number}"
    return folder


def dataset_folder(dataset: str, root: str) -> str:
    """Return what stands for a dataset in the paths of runs: its name; for one's own images that of their place.

    Args:
        dataset: its registered name in any case, or the stem of its YAML.
        root: DATASET.ROOT; "": it has none.
    """
    own = dataset.lower().replace("_", "") == "imagefolder"
    return (place_name(root) if own and root else "") or dataset


def parent_folder(output: Path, dataset: str, trainer: str, config: str, shots: int) -> Path:
    """Return the folder that holds the runs of all seeds."""
    return output / dataset / trainer / f"{config}_{_shots(shots)}"


def _shots(number: int) -> str:
    return f"{number}shots" if number > 0 else "full"


def _is_cut_short(folder: Path, cfg: CfgNode) -> bool:
    if (folder / "DONE").exists():
        return False
    try:
        earlier = read_yaml(folder / "config.yaml")
    except ValueError:
        return False
    wanted = cfg.clone()
    wanted.OUTPUT_DIR = str(folder)
    return earlier == plain_config(wanted)


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def remove_traces(log_file: Path, found: Path) -> None:
    """Remove what looks like a run that never started: its log, and the folders made for it below `found`."""
    log_file.unlink()
    for folder in (log_file.parent.absolute(), *log_file.absolute().parents[1:]):
        if folder == found.absolute() or any(folder.iterdir()):
            break
        folder.rmdir()

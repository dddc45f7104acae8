"""What command lines of comparisons name: methods with their configs, datasets, lists of numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import datasets
import trainers
from dassl.config import get_cfg_default
from dassl.engine import TRAINER_REGISTRY
from dassl.utils import InputError, did_you_mean
from scripts.grid import ROOT


@functools.cache  # it reads all configs, and is asked once per method
def methods_with(config: str) -> dict[str, Path]:
    """Trainer -> its config of that name, of all trainers that have one which leaves the dataset open.

    Raises:
        InputError: there is none.
    """
    found = {}
    for path in sorted((ROOT / "configs" / "trainers").glob(f"*/{config}.yaml")):
        cfg = get_cfg_default()
        datasets.extend_cfg(cfg)
        trainers.extend_cfg(cfg)
        cfg.merge_from_file(str(path))
        if not cfg.DATASET.NAME:
            found[cfg.TRAINER.NAME] = path.relative_to(ROOT) if ROOT == Path.cwd() else path
    if not found:
        raise InputError(f"Expected --config to be the name of files in configs/trainers/*/ but got {config!r}")
    return found


def choose_methods(asked: str, config: str) -> list[tuple[str, str, Path]]:
    """(name in tables, trainer, config) of each method.

    Raises:
        InputError: a trainer that does not exist, or has no such config.
    """
    if not asked:
        return [(name, name, path) for name, path in methods_with(config).items()]
    chosen = []
    for item in asked.split(","):
        name, _, own = item.strip().partition(":")
        known = TRAINER_REGISTRY.registered_names()
        if name not in known:
            raise InputError(f"Expected a trainer but got {name!r}{did_you_mean(name, known)}")
        paths = methods_with(own or config)
        if name not in paths:
            raise InputError(f"Expected a config {own or config}.yaml of {name} in configs/trainers but there is none")
        chosen.append((item.strip(), name, paths[name]))
    return chosen


def check_datasets(names: Iterable[str]) -> None:
    """InputError unless each is the name of a file in configs/datasets."""
    known = sorted(path.stem for path in (ROOT / "configs" / "datasets").glob("*.yaml"))
    for name in names:
        if name not in known:
            raise InputError(f"Expected datasets to be names of files in configs/datasets but got {name!r}")


def whole_numbers(text: str) -> list[int]:
    """ "1,2,4" -> [1, 2, 4]."""
    return [int(part) for part in text.split(",")]

"""Say before long work whether weights and images are there, and how long training will take."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from dassl.data.datasets import build_dataset
from dassl.engine import build_trainer
from dassl.engine.hooks import LearningRate, Losses, Timing
from dassl.utils import InputError
from dassl.utils.logger import muted
from scripts.lib.dataset_sources import SOURCES, counts_of
from scripts.lib.grid import Run
from trainers.api.auto import seconds_of_training
from trainers.api.runs import apart
from trainers.app.building import explained
from trainers.app.configuration import default_cfg
from trainers.clip.load import shared_clips


def check_ready(runs: Sequence[Run], root: str | None) -> Iterator[str]:
    """Check weights, settings and images of runs, and yield a line on each dataset.

    Args:
        runs: the runs.
        root: the folder that holds the datasets; None: where the configurations say.

    Raises:
        InputError: something is missing, or a dataset is not the published one. All datasets are looked at first; the
            lines say what to do about each.
    """
    first = {run.dataset: run for run in reversed(runs)}
    asked = {name: run.cfg() for name, run in sorted(first.items())}  # settings are checked, and weights looked for
    errors: dict[str, InputError] = {}
    for name, wanted in asked.items():
        try:
            told = _told(name, wanted)
        except InputError as error:
            errors[name] = error
            told = str(error)
        yield f"{name}: {told}"
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        raise InputError(
            f"Expected {len(asked)} datasets as published but got {len(asked) - len(errors)}; what is wrong with the "
            f"others is said above: {', '.join(errors)}"
        )


def _told(name: str, wanted: Any) -> str:
    """Return how large the dataset of a configuration is; raise an InputError where it is not the published one."""
    cfg = default_cfg()
    cfg.DATASET.NAME, cfg.DATASET.ROOT = wanted.DATASET.NAME, wanted.DATASET.ROOT
    with muted(logging.ERROR):
        counts = counts_of(build_dataset(cfg))
    told = "{:,} classes, {:,} images to train on, {:,} for validation, {:,} to test on"
    source = SOURCES.get(wanted.DATASET.NAME)
    if source is not None and counts != source.counts:
        raise InputError(
            f"Expected {name} to have {told.format(*source.counts)}, as published, but it has {told.format(*counts)}: "
            "see docs/DATASETS.md"
        )
    return told.format(*counts) + (", as published" if source is not None else "")


def seconds_of_runs(runs: Sequence[Run]) -> dict[str, float]:
    """Return the seconds that training takes in all runs of each dataset, from a few steps of its largest one.

    Steps are taken to grow with the number of training images of each class. Runs on a part of the classes have a
    largest one of their own.
    """
    found: dict[str, float] = {}
    parts = {run: (run.dataset, str(run.cfg().DATASET.SUBSAMPLE_CLASSES)) for run in runs}
    for part in dict.fromkeys(parts.values()):
        name, mine = part[0], [run for run in runs if parts[run] == part]
        largest = max(mine, key=lambda run: run.shots)
        with contextlib.ExitStack() as stack:
            stack.enter_context(apart(largest.seed, warnings=False))
            stack.enter_context(shared_clips())
            cfg = largest.cfg()
            stack.enter_context(explained(cfg))
            trainer = build_trainer(cfg, None, [Timing(), LearningRate(), Losses()])
            seconds = seconds_of_training(trainer) if trainer.trains(cfg) else 0.0
        found[name] = found.get(name, 0.0) + seconds * sum(run.shots for run in mine) / largest.shots
    return found

"""From a command line to the frozen configuration of a run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dassl.config import CfgNode, get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from dassl.engine import TRAINER_REGISTRY
from dassl.engine.environment import why_no_gpu
from dassl.utils import InputError, did_you_mean, distributed

from .. import ALIASES, complete_cfg, extend_cfg, find_config
from .data import datasets
from .run_folder import choose_output_dir

# Keys of DATASET that say how a dataset is used, not which: in them the trainer's file wins, as in other settings.
OF_THE_RUN = ("DATASET.NUM_SHOTS", "DATASET.SUBSAMPLE_CLASSES")
# Flag -> the key that it sets.
FLAG_KEYS = {
    "root": "DATASET.ROOT",
    "output_dir": "OUTPUT_DIR",
    "resume": "RESUME",
    "seed": "SEED",
    "source_domains": "DATASET.SOURCE_DOMAINS",
    "target_domains": "DATASET.TARGET_DOMAINS",
    "transforms": "INPUT.TRANSFORMS",
    "trainer": "TRAINER.NAME",
    "backbone": "MODEL.BACKBONE.NAME",
    "head": "MODEL.HEAD.NAME",
}


def default_cfg() -> CfgNode:
    """Return the defaults of the toolbox with the keys of the datasets and of every trainer."""
    cfg = get_cfg_default()
    datasets.extend_cfg(cfg)
    extend_cfg(cfg)
    return cfg


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    """Return the frozen configuration, its names checked against the registries and its output folder chosen."""
    cfg = default_cfg()
    default_output = cfg.OUTPUT_DIR
    if args.config is not None:
        check_method(args.trainer)
        args.config_file = str(find_config(args.trainer, args.config))
    said = {
        file: cfg.merge_from_file(file) for file in (args.dataset_config_file, args.config_file) if file is not None
    }
    if args.dataset_config_file is not None:  # this file says which dataset, also where the trainer's file names one
        of_dataset = said[args.dataset_config_file].items()
        ours = [(key, value) for key, value in of_dataset if key.startswith("DATASET.") and key not in OF_THE_RUN]
        cfg.merge_from_list([word for pair in ours for word in pair])
    pairs = [*_flag_pairs(args), *args.opts]
    cfg.merge_from_list(pairs)

    check_method(cfg.TRAINER.NAME)
    complete_cfg(cfg, _given_keys(list(said.values()), pairs, cfg.MODEL.BACKBONE.NAME))
    cfg.DATASET.NAME = cfg.DATASET.NAME or datasets.name_dataset(cfg.DATASET.ROOT)
    _check_name("the dataset (DATASET.NAME)", cfg.DATASET.NAME, DATASET_REGISTRY.registered_names())
    if cfg.SEED < -1:
        raise InputError(f"Expected the seed to be -1 (none) or at least 0 but got {cfg.SEED}")
    if "USE_CUDA" in args.opts[::2] and cfg.USE_CUDA and not torch.cuda.is_available():
        raise InputError(f"Expected a GPU for USE_CUDA True but got none: {why_no_gpu()}")

    distributed.start(cfg.USE_CUDA, cfg.DIST.TIMEOUT)
    named = args.output_dir is not None or "OUTPUT_DIR" in args.opts[::2]
    if not named and cfg.OUTPUT_DIR == default_output:
        # Rank 0 chooses: once it has begun to write there, the others would find the folder taken.
        chosen = choose_output_dir(cfg, args) if distributed.is_main() else ""
        cfg.OUTPUT_DIR = distributed.broadcast_object(str(chosen))
    cfg.freeze()
    return cfg


def _given_keys(said: Sequence[Mapping[str, Any]], pairs: Sequence[Any], backbone: str) -> set[str]:
    """Return the keys that somebody has given.

    A file that names another backbone gives none: its values are meant for that one.
    """
    found = set(pairs[::2])
    for keys in said:
        if keys.get("MODEL.BACKBONE.NAME", backbone) == backbone:
            found.update(keys)
    return found


def check_method(name: str, what: str = "--trainer (or TRAINER.NAME)") -> None:
    """Check the name of a method.

    Args:
        what: gave the name, for the message.

    Raises:
        InputError: no trainer of that name; the message has the nearest one.
    """
    _check_name(what, name, TRAINER_REGISTRY.registered_names(), ALIASES)


def _check_name(what: str, name: str, known: Sequence[str], aliases: Mapping[str, str] | None = None) -> None:
    if name not in known:
        got = f'got "{name}"{did_you_mean(name, known, aliases)}' if name else "none was given"
        raise InputError(f"Expected {what} to be one of {', '.join(known)} but {got}")


def _flag_pairs(args: argparse.Namespace) -> list[Any]:
    pairs: list[Any] = []
    for flag, key in FLAG_KEYS.items():
        value = getattr(args, flag)
        if value is not None:
            pairs += [key, tuple(value) if isinstance(value, list) else value]
    if args.skip_bad_images:
        pairs += ["DATALOADER.SKIP_BAD_IMAGES", True]
    if args.force_resume:
        pairs += ["TRAIN.FORCE_RESUME", True]
    if args.no_cache:
        pairs += ["FEATURE_CACHE.USE", False]
    return pairs

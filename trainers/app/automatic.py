"""Choose the method of `--trainer auto`, by cross-validation on the run's training and validation images."""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile

from tabulate import tabulate

from dassl.data.datasets import build_dataset
from dassl.utils import InputError, distributed

from ..clip.load import shared_clips
from ..features import remembered_features
from .configuration import setup_cfg

logger = logging.getLogger(__name__)

AUTO = "auto"  # what --trainer says to have a method chosen


def choose_method(args: argparse.Namespace) -> list[str]:
    """Set the trainer, its configuration and its settings in `args`, and return lines that say what was found.

    Settings that the command line gives count for every candidate, and win over the candidate's own.

    Raises:
        InputError: the command line says what only a chosen method's could, or names no backbone.
    """
    from ..api.auto import CANDIDATES, compare  # the room of FewShotClassifier knows this one
    from ..api.report import METHOD_COLUMNS, method_row
    from ..api.runs import VALIDATION_SHARE, Runner, apart, fitting_config

    for flag in ("config", "config_file", "model_dir", "resume"):
        if getattr(args, flag):
            raise InputError(f"Expected no --{flag.replace('_', '-')} with --trainer {AUTO}, which chooses a method")
    pairs = dict(zip(args.opts[::2], args.opts[1::2], strict=True))
    backbone = args.backbone or pairs.get("MODEL.BACKBONE.NAME", "")
    if not backbone:
        raise InputError(f"Expected --backbone with --trainer {AUTO} but got none (such as ViT-B/32, or tiny)")
    first = copy.copy(args)
    first.trainer, first.config = CANDIDATES[0].method, fitting_config(CANDIDATES[0].method, backbone)
    cfg = setup_cfg(first)
    seed = max(cfg.SEED, 0)
    device = "auto" if cfg.USE_CUDA else "cpu"
    runner = Runner(backbone, cfg.MODEL.BACKBONE.WEIGHTS, seed, device, "", tuple(pairs.items()))
    with (
        tempfile.TemporaryDirectory(prefix="dlr_clip_") as folder,
        apart(seed, warnings=False),
        shared_clips(),
        remembered_features(),
    ):
        dataset = build_dataset(cfg)
        found = compare(runner, [*dataset.train_x, *(dataset.val or ())], folder, VALIDATION_SHARE)
    choice = distributed.broadcast_object(found.chosen.choice)  # rounding may differ between machines
    args.trainer, args.config = choice.method, fitting_config(choice.method, backbone, choice.config)
    args.opts = [part for pair in choice.settings for part in pair] + args.opts
    table = tabulate([method_row(one) for one in found.scores], METHOD_COLUMNS, disable_numparse=True)
    return [f"--trainer {AUTO}: {choice.shown} ({found.why})", *(table.splitlines() if found.scores else ())]

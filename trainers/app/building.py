"""From a command line to a trainer that is ready, and the error messages where the building or the run fails."""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dassl.config import CfgNode, differing, plain_config
from dassl.engine import TRAINER_REGISTRY, build_trainer
from dassl.engine.environment import describe
from dassl.engine.reliability.finite import NotFiniteError, last_checkpoint
from dassl.engine.reliability.lock import FolderLock
from dassl.engine.reliability.trouble import RunStoppedError, explain_trouble
from dassl.utils import InputError, close_logger, distributed, one_line, set_random_seed, setup_logger
from dassl.utils.cli import SETUP_ERRORS, given_wrongly
from dassl.utils.files import remove_leftovers
from dassl.utils.logger import ALL_LINES, DETAIL, MAIN_LINES, QUIET

from .. import warn_if_for_another
from .automatic import AUTO, choose_method
from .configuration import default_cfg, setup_cfg
from .run_folder import existing, remove_traces

logger = logging.getLogger(__name__)


def build(args: argparse.Namespace, held: contextlib.ExitStack | None = None) -> Any:
    """Build the trainer that the command line asks for; load its model when only evaluation is wanted.

    Args:
        held: takes the lock of the output folder; None: it is not locked.
    """
    chosen = choose_method(args) if args.trainer == AUTO else []
    cfg = setup_cfg(args)
    if cfg.SEED >= 0:
        set_random_seed(cfg.SEED)
    elif distributed.world_size() > 1:  # all processes must draw the same, for instance the same images
        set_random_seed(distributed.broadcast_object(random.SystemRandom().randrange(2**32)))
    found = existing(Path(cfg.OUTPUT_DIR))
    lock = None
    if held is not None and distributed.is_main() and not args.dry_run:
        lock = held.enter_context(FolderLock(cfg.OUTPUT_DIR))
        remove_leftovers(cfg.OUTPUT_DIR)
    shown = QUIET if args.quiet else ALL_LINES if args.verbose else MAIN_LINES
    log_file = setup_logger(None if args.dry_run else cfg.OUTPUT_DIR, distributed.rank(), shown)
    try:
        for line in chosen:
            logger.info(line)
        if cfg.SEED >= 0:
            logger.info(f"Setting fixed seed: {cfg.SEED}", extra=DETAIL)
        if torch.cuda.is_available() and cfg.USE_CUDA:
            torch.backends.cudnn.benchmark = True
        if not args.dry_run:
            logger.info(f"Output folder: {cfg.OUTPUT_DIR}")
        with explained(cfg):
            trainer = build_trainer(cfg)
        _check_trainable(trainer, args)
        if args.eval_only:
            trainer.load_model(args.model_dir or "", epoch=args.load_epoch)
        if distributed.is_main():  # not before: an error's one line would follow hundreds of others
            print_head(args, cfg, trainer.device)
            if args.config_file is not None:
                warn_if_for_another(args.config_file, cfg.TRAINER.NAME)
    except SETUP_ERRORS as error:
        close_logger()
        if given_wrongly(error) and lock is not None and log_file is not None and not args.debug:
            lock.release()
            remove_traces(log_file, found)
        raise
    return trainer


def _check_trainable(trainer: Any, args: argparse.Namespace) -> None:
    # Shifted test sets hand their test images out as train_x too, because class names are read off it.
    if trainer.dm.dataset.test_only and trainer.has_training_step():
        if args.eval_only or args.no_train:
            return
        raise InputError(
            f"Expected a dataset to train on but {trainer.cfg.DATASET.NAME} has test images only: "
            "evaluate a trained model on it with --eval-only --model-dir"
        )


def print_head(args: argparse.Namespace, cfg: CfgNode, device: torch.device) -> None:
    """Log the arguments, the configuration and the system of a run that begins; the console has a summary of these."""
    changes = differing(plain_config(default_cfg()), plain_config(cfg))
    others = [f"{change.key} {_shown(change.here)}" for change in changes]
    lines = textwrap.wrap(", ".join(others), 110, break_long_words=False, break_on_hyphens=False)
    logger.info("Settings that are not the defaults (all of them: config.yaml):%s", "".join(f"\n  {x}" for x in lines))
    _banner("Arguments")
    for key, value in sorted(vars(args).items()):
        logger.info(f"{key}: {value}", extra=DETAIL)
    _banner("Config")
    logger.info(cfg, extra=DETAIL)
    _banner("System info")  # not upstream's collect_env_info, which starts a dozen programs
    for key, value in describe(device).items():
        logger.info(f"{key}: {value}", extra=DETAIL)


def _shown(value: Any) -> str:
    return one_line(str(value), 60) or "''"


def _banner(title: str) -> None:
    stars = "*" * (len(title) + 6)
    logger.info(f"{stars}\n** {title} **\n{stars}", extra=DETAIL)


@contextlib.contextmanager
def explained(cfg: CfgNode, trainer: Any = None) -> Iterator[None]:
    """Turn trouble with the machine, and lost numbers, into an error that says what it is, what helps and what is kept.

    Raises:
        RunStoppedError: in place of such an error. While the trainer is built (`trainer` is None), an error of a file
            counts as something given wrongly, and is raised as it is.
    """
    try:
        yield
    except InputError:
        raise
    except NotFiniteError as error:
        raise RunStoppedError(str(error)) from error
    except Exception as error:
        if trainer is None and given_wrongly(error):
            raise
        advice = TRAINER_REGISTRY.get(cfg.TRAINER.NAME).memory_advice(cfg)
        message = explain_trouble(_told_late(error), advice)
        if not message:
            raise
        kept = None if trainer is None else last_checkpoint(trainer)
        then = f"kept: {kept}; {distributed.GO_ON}" if kept else "kept: no checkpoint yet"
        raise RunStoppedError(f"{message}\n  {then}") from error


def _told_late(error: Exception) -> Exception:
    # When a loader process has died, whoever reads from it fails at once. A moment later torch's signal handler raises
    # an error that has the number of the process, whatever is being done then. This waits for that error.
    if isinstance(error, ConnectionError | EOFError):
        try:
            time.sleep(0.5)
        except RuntimeError as told:
            return told
    return error

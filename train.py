"""Train or evaluate a registered trainer on a registered dataset, with the command line that such toolboxes have.

    python train.py --trainer NAME (--config NAME | --config-file FILE) [flags] [KEY VALUE ...]

Settings, later ones winning: defaults, --dataset-config-file, --config or --config-file (but which dataset it is, is
said by the dataset's file), named flags, KEY VALUE pairs. A flag that is not given changes nothing, and any value given
counts, 0 included. --config tiny means the trainer's own file of that name: configs/trainers/<its folder>/tiny.yaml.
Without a dataset, --root may be your own images; without --root, Digits is used.

Several processes, on one machine (on several: torchrun's --nnodes and --rdzv-endpoint), that make up one run:

    torchrun --nproc_per_node N train.py ...

A run that was stopped goes on when the same command is given again, and ends as if it had not been stopped. SIGTERM and
Ctrl-C have it finish its step and write a checkpoint first; a second one stops at once.

Exit codes: 0 done; 2 something given was wrong (one line on stderr; --debug adds the traceback); 1 anything else: a
few lines for numbers that were lost, a full disk or memory, or another process that ended, a traceback for a bug; 143
SIGTERM; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import shlex
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dassl.utils.cli import SETUP_ERRORS, Parser, fail, given_wrongly, parse_first, registered_names, run_main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; every option that is not given is None (switches: False)."""
    parser = Parser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        closing=lambda: textwrap.fill(
            f"Trainers: {', '.join(registered_names(Path(__file__).parent / 'trainers', 'TRAINER_REGISTRY'))}.", 100
        ),
    )
    parser.add_argument("--root", help="folder that holds the datasets")
    parser.add_argument("--output-dir", help="folder of this run (default: made of dataset, trainer, config, seed)")
    parser.add_argument("--resume", help="folder of an earlier run to resume from")
    parser.add_argument("--force-resume", action="store_true", help="resume also with settings that change the result")
    parser.add_argument("--seed", type=int, help="0 or larger seeds everything; -1 nothing")
    parser.add_argument("--source-domains", nargs="+", help="source domains of domain-adaptation datasets")
    parser.add_argument("--target-domains", nargs="+", help="target domains of domain-adaptation datasets")
    parser.add_argument("--transforms", nargs="+", help="names of the training transforms")
    parser.add_argument("--config", help="short name of one of the trainer's YAML files, such as tiny")
    parser.add_argument("--config-file", help="YAML of the trainer (instead of --config)")
    parser.add_argument("--dataset-config-file", help="YAML of the dataset")
    parser.add_argument("--trainer", help="name of the trainer")
    parser.add_argument("--backbone", help="name of the backbone")
    parser.add_argument("--head", help="name of the head")
    parser.add_argument("--eval-only", action="store_true", help="evaluate only")
    parser.add_argument("--model-dir", help="with --eval-only: folder of the run to load")
    parser.add_argument("--load-epoch", type=int, help="with --model-dir: epoch to load (default: see the trainer)")
    parser.add_argument("--skip-bad-images", action="store_true", help="go on without images that cannot be read")
    parser.add_argument("--no-cache", action="store_true", help="neither read nor keep features of images on disk")
    parser.add_argument("--no-train", action="store_true", help="build everything, train nothing")
    parser.add_argument("--dry-run", action="store_true", help="build everything, run one batch, save nothing")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config pairs; must come last")
    args = parser.parse_args(argv)
    if args.opts[:1] == ["--"]:
        del args.opts[0]
    misplaced = [key for key in args.opts[::2] if key.startswith("-")]
    if misplaced:
        parser.error(f"Expected {misplaced[0]} to come before the KEY VALUE pairs")
    if len(args.opts) % 2:
        parser.error(f"Expected KEY VALUE pairs but {args.opts[-1]} has no value")
    if args.config is not None and args.config_file is not None:
        parser.error("Expected --config or --config-file but got both")
    if args.config is not None and args.trainer is None:
        parser.error("Expected --config to come with --trainer, whose files it means")
    if args.model_dir is not None and not args.eval_only:
        parser.error("Expected --model-dir to come with --eval-only (to continue a run, use --resume)")
    if args.load_epoch is not None and args.model_dir is None:
        parser.error("Expected --load-epoch to come with --model-dir")
    return args


if __name__ == "__main__":
    parse_first(parse_args)

import torch

import datasets
import trainers
from dassl.config import CfgNode, get_cfg_default, keys_in_file, plain_config, read_yaml
from dassl.data.datasets import DATASET_REGISTRY
from dassl.engine import TRAINER_REGISTRY, build_trainer
from dassl.engine.environment import why_no_gpu
from dassl.engine.reliability.finite import NotFiniteError, last_checkpoint
from dassl.engine.reliability.lock import FolderLock, is_locked
from dassl.engine.reliability.trouble import RunStoppedError, explain_trouble
from dassl.utils import (
    InputError,
    close_logger,
    collect_env_info,
    did_you_mean,
    distributed,
    note_in_log,
    set_random_seed,
    setup_logger,
    stopping,
)
from dassl.utils.files import remove_leftovers

logger = logging.getLogger("train")

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


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    """The frozen configuration, its names checked against the registries and its output folder chosen."""
    cfg = get_cfg_default()
    datasets.extend_cfg(cfg)
    trainers.extend_cfg(cfg)
    default_output = cfg.OUTPUT_DIR
    if args.config is not None:
        _check_trainer(args.trainer)
        args.config_file = str(trainers.find_config(args.trainer, args.config))
    for file in (args.dataset_config_file, args.config_file):
        if file is not None:
            cfg.merge_from_file(file)
    if args.dataset_config_file is not None:  # a trainer's file that names a dataset has not been asked for one
        said = keys_in_file(args.dataset_config_file).items()
        ours = [(key, value) for key, value in said if key.startswith("DATASET.") and key not in OF_THE_RUN]
        cfg.merge_from_list([word for pair in ours for word in pair])
    pairs = [*_flag_pairs(args), *args.opts]
    cfg.merge_from_list(pairs)

    _check_trainer(cfg.TRAINER.NAME)
    trainers.complete_cfg(cfg, _given_keys(args, pairs, cfg.MODEL.BACKBONE.NAME))
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


def _given_keys(args: argparse.Namespace, pairs: Sequence[Any], backbone: str) -> set[str]:
    """The keys that somebody has given; of a file that names another backbone none, as it speaks of that one."""
    found = set(pairs[::2])
    for file in (args.dataset_config_file, args.config_file):
        keys = keys_in_file(file) if file is not None else {}
        if keys.get("MODEL.BACKBONE.NAME", backbone) == backbone:
            found.update(keys)
    return found


def _check_trainer(name: str) -> None:
    _check_name("--trainer (or TRAINER.NAME)", name, TRAINER_REGISTRY.registered_names(), trainers.ALIASES)


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


def choose_output_dir(cfg: CfgNode, args: argparse.Namespace) -> Path:
    """A folder for a run whose command names none: `output/<dataset>/<trainer>/<config>_<k>shots/seed<s>[-n]`.

    The first of `seed<s>`, `seed<s>-2`, `seed<s>-3`, ... that is free, or that holds a run of this very configuration
    which was cut short (it is resumed there). A finished run is never written over, nor is one that is going on.
    """
    dataset = Path(args.dataset_config_file).stem if args.dataset_config_file else cfg.DATASET.NAME.lower()
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


def parent_folder(output: Path, dataset: str, trainer: str, config: str, shots: int) -> Path:
    """The folder that holds the runs of all seeds."""
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


def print_head(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Arguments, configuration and system, in the log of a run that begins."""
    _banner("Arguments")
    for key, value in sorted(vars(args).items()):
        logger.info(f"{key}: {value}")
    _banner("Config")
    logger.info(cfg)
    logger.info("Collecting env info ...")
    logger.info(f"** System info **\n{collect_env_info()}\n")


def _banner(title: str) -> None:
    stars = "*" * (len(title) + 6)
    logger.info(f"{stars}\n** {title} **\n{stars}")


def build(args: argparse.Namespace, held: contextlib.ExitStack | None = None) -> Any:
    """The trainer that the command line asks for, with its model loaded when only evaluation is wanted.

    Args:
        held: takes the lock of the output folder; None: it is not locked.
    """
    cfg = setup_cfg(args)
    if cfg.SEED >= 0:
        set_random_seed(cfg.SEED)
    elif distributed.world_size() > 1:  # all must draw the same, for instance the same images
        set_random_seed(distributed.broadcast_object(random.SystemRandom().randrange(2**32)))
    found = _existing(Path(cfg.OUTPUT_DIR))
    lock = None
    if held is not None and distributed.is_main() and not args.dry_run:
        lock = held.enter_context(FolderLock(cfg.OUTPUT_DIR))
        remove_leftovers(cfg.OUTPUT_DIR)
    log_file = setup_logger(None if args.dry_run else cfg.OUTPUT_DIR, distributed.rank())
    try:
        if cfg.SEED >= 0:
            logger.info(f"Setting fixed seed: {cfg.SEED}")
        if torch.cuda.is_available() and cfg.USE_CUDA:
            torch.backends.cudnn.benchmark = True
        if not args.dry_run:
            logger.info(f"Output folder: {cfg.OUTPUT_DIR}")
        with _explained(cfg):
            trainer = build_trainer(cfg)
        _check_trainable(trainer, args)
        if args.eval_only:
            trainer.load_model(args.model_dir or "", epoch=args.load_epoch)
        if distributed.is_main():  # not before: an error's one line would follow hundreds of others
            print_head(args, cfg)
            if args.config_file is not None:
                trainers.warn_if_for_another(args.config_file, cfg.TRAINER.NAME)
    except SETUP_ERRORS as error:
        close_logger()
        if given_wrongly(error) and lock is not None and log_file is not None and not args.debug:
            lock.release()
            _remove_traces(log_file, found)
        raise
    return trainer


def _check_trainable(trainer: Any, args: argparse.Namespace) -> None:
    # Shifted test sets hand their test images out as train_x too, because class names are read off it.
    if getattr(trainer.dm.dataset, "test_only", False) and trainer.has_training_step():
        if args.eval_only or args.no_train:
            return
        raise InputError(
            f"Expected a dataset to train on but {trainer.cfg.DATASET.NAME} has test images only: "
            "evaluate a trained model on it with --eval-only --model-dir"
        )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _remove_traces(log_file: Path, found: Path) -> None:
    # A run that never started leaves nothing that looks like one: neither its log nor the folders made for it.
    log_file.unlink()
    for folder in (log_file.parent.absolute(), *log_file.absolute().parents[1:]):
        if folder == found.absolute() or any(folder.iterdir()):
            break
        folder.rmdir()


def run(trainer: Any, args: argparse.Namespace) -> None:
    """Do what was asked for with a trainer that is ready."""
    if args.dry_run:
        trainer.dry_run()
    elif args.eval_only:
        trainer.test()
    elif not args.no_train:
        trainer.train()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    code, debug = 1, False
    with stopping.watching():
        try:
            distributed.connect()
            with _silent_unless_main():  # --help, and errors that all processes make
                args = parse_args(argv)
            debug = args.debug
            code = _run(args)
            if code == 0:
                distributed.stop()
        except (Exception, stopping.StoppedError) as error:
            if stopping.noted() and not distributed.is_peer_lost(error):  # the signal has hit others too, say a worker
                error = stopping.StoppedError(stopping.noted())
            stop = error if isinstance(error, stopping.StoppedError) else None
            code = 1 if stop is None else stop.exit_code
            lost = stop is not None or distributed.is_peer_lost(error)
            message = _why_it_ends(error, argv) if lost else ""
            # All processes have come to the same place: rank 0, which has the log, says so.
            kept = stop is not None and stop.kept
            if distributed.is_main() if kept else distributed.first_to_fail():
                if isinstance(error, RunStoppedError):
                    message = f"error: {error}"
                    if debug and error.__cause__ is not None:
                        traceback.print_exception(error.__cause__)
                elif not lost:
                    raise
                note_in_log(message)
                print(message, file=sys.stderr)
            if kept:
                distributed.stop()
        finally:
            close_logger()
    return code


def _why_it_ends(error: BaseException, argv: Sequence[str] | None) -> str:
    """One line, with the command that goes on."""
    if isinstance(error, stopping.StoppedError) and (error.kept or distributed.world_size() == 1):
        command = f"python train.py {shlex.join(sys.argv[1:] if argv is None else argv)}"
        if distributed.launched():
            command = f"the same torchrun command ({command})"
        stopping.ignore_further()
        if error.kept:
            return f"stopped by {error}, and what was done is kept; it goes on with: {command}"
        return f"stopped by {error}; to start again, from the last checkpoint if there is one: {command}"
    return f"error: {distributed.why_it_ends(error)}"


def _run(args: argparse.Namespace) -> int:
    with contextlib.ExitStack() as held:
        try:
            trainer = build(args, held)
        except SETUP_ERRORS as error:
            if given_wrongly(error):
                return _fail(error, args.debug)
            raise
        try:
            with _explained(trainer.cfg, trainer):
                run(trainer, args)
        except InputError as error:  # a bad image, say, that only its turn in a batch could show
            return _fail(error, args.debug)
        return 0


@contextlib.contextmanager
def _explained(cfg: CfgNode, trainer: Any = None) -> Iterator[None]:
    """Turn trouble with the machine, and lost numbers, into an error that says what it is, what helps and what is kept.

    Raises:
        RunStoppedError: instead of those. While the trainer is built (`trainer` None) files count as given wrongly.
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
        advice = getattr(TRAINER_REGISTRY.get(cfg.TRAINER.NAME), "memory_advice", None)
        message = explain_trouble(_told_late(error), advice(cfg) if advice else ())
        if not message:
            raise
        kept = None if trainer is None else last_checkpoint(trainer)
        then = f"kept: {kept}; {distributed.GO_ON}" if kept else "kept: no checkpoint yet"
        raise RunStoppedError(f"{message}\n  {then}") from error


def _told_late(error: Exception) -> Exception:
    # That a loader process has died is seen by who reads from it, and told a moment later, with its number, by torch's
    # handler of signals, whatever is being done then: it is waited for here.
    if isinstance(error, ConnectionError | EOFError):
        try:
            time.sleep(0.5)
        except RuntimeError as told:
            return told
    return error


def _fail(error: BaseException, debug: bool) -> int:
    # Of several processes that meet the same error, one says it.
    return fail(error, debug) if distributed.first_to_fail() else 2


@contextlib.contextmanager
def _silent_unless_main() -> Iterator[None]:
    if distributed.is_main():
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


if __name__ == "__main__":
    code = run_main(main)
    if hasattr(signal, "SIGCHLD"):  # torch's handler raises where a loader's process is ended together with this one
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.exit(code)

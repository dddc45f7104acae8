"""Train or evaluate a registered trainer on a registered dataset, with the command line that such toolboxes have.

    {command} --trainer NAME (--config NAME | --config-file FILE) [flags] [KEY VALUE ...]

Settings, later ones winning: defaults, --dataset-config-file, --config or --config-file (but which dataset it is, is
said by the dataset's file), named flags, KEY VALUE pairs. A flag that is not given changes nothing, and any value given
counts, 0 included. --config tiny means the trainer's own file of that name: configs/trainers/<its folder>/tiny.yaml.
Without a dataset, --root may be your own images; without --root, Digits is used.

Several processes, on one machine (on several: torchrun's --nnodes and --rdzv-endpoint), that make up one run:

    torchrun --nproc_per_node N {torchrun} ...

A run that was stopped goes on when the same command is given again, and ends as if it had not been stopped. SIGTERM and
Ctrl-C have it finish its step and write a checkpoint first; a second one stops at once.

Exit codes: 0 done; 2 something given was wrong (one line on stderr; --debug adds the traceback); 1 anything else: a
few lines for numbers that were lost, a full disk or memory, or another process that ended, a traceback for a bug; 143
SIGTERM; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence

from dassl.utils.cli import Parser, parse_first, registered_names

from .places import METHODS, import_ours, spoken


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says; every option that is not given is None (switches: False)."""
    command = spoken("train")
    by_file = command.startswith("python ")
    parser = Parser(
        prog=command.removeprefix("python "),
        description=(__doc__ or "").format(
            command=command, torchrun="train.py" if by_file else "-m dlr_clip_cli train"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        closing=lambda: textwrap.fill(f"Trainers: {', '.join(registered_names(METHODS, 'TRAINER_REGISTRY'))}.", 100),
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
    parser.add_argument("--trainer", help="name of the trainer; auto: chosen by cross-validation (with --backbone)")
    parser.add_argument("--backbone", help="name of the backbone")
    parser.add_argument("--head", help="name of the head")
    parser.add_argument("--eval-only", action="store_true", help="evaluate only")
    parser.add_argument("--model-dir", help="with --eval-only: folder of the run to load")
    parser.add_argument("--load-epoch", type=int, help="with --model-dir: epoch to load (default: see the trainer)")
    parser.add_argument("--skip-bad-images", action="store_true", help="go on without images that cannot be read")
    parser.add_argument("--no-cache", action="store_true", help="neither read nor keep features of images on disk")
    parser.add_argument("--no-train", action="store_true", help="build everything, train nothing")
    parser.add_argument("--dry-run", action="store_true", help="build everything, run one batch, save nothing")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--quiet", action="store_true", help="show warnings and results only; log.txt has every line")
    shown.add_argument("--verbose", action="store_true", help="show every line that log.txt has")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parse_first(lambda: parse_args(argv))
    code: int = import_ours("trainers.app.train").run_program(argv)
    return code

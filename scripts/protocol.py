"""The protocols of a paper, each one command: runs what is missing, and writes the table.

    python scripts/protocol.py few-shot --dataset digits,shapes --trainers TipAdapterF,DLRCLIP --shots 1,2,4,8,16
    python scripts/protocol.py base2new --dataset shapes --trainers ZeroshotCLIP,CoOp,CoCoOp,MMA,DLRCLIP
    python scripts/protocol.py cross-dataset --source shapes --targets digits --trainers CoOp,DLRCLIP
    python scripts/protocol.py ood --source shapes --trainers ZeroshotCLIP,DLRCLIP
    python scripts/protocol.py ablation --dataset digits --trainers DLRCLIP
    python scripts/protocol.py label-noise --dataset digits --trainers CoOp,CoOp@mae,GDA,GDA@drop,GDA@relabel
    python scripts/protocol.py transductive --dataset digits,shapes --tasks 100

A method is `TRAINER[:CONFIG][@VARIANT]`: CONFIG is the name of a YAML in configs/trainers/*/ (else that of --config),
VARIANT one of the trainer's in scripts/lib/ablations.py, or one of those that every method has there: mae, uncleaned,
drop, relabel, mae+drop, mae+relabel. Without --trainers: every method that has such a config, leaves the dataset open
and can be run; the others are named (ablation: DLRCLIP; transductive: every transductive method, without training
images, by CONFIG_zeroshot where there is one). KEY VALUE pairs at the end go to every run. Shots are 16 unless given;
base2new, cross-dataset, ood and ablation take one number. label-noise trains with the shares of wrong labels in
--noise, or with such shares of images of the dataset --foreign. Without --targets: the shifted test sets of ImageNet or
Shapes; across datasets, the other ten benchmarks or Digits.

Folders are those of CoOp's scripts (listed in scripts/lib/protocol_plan.py). A run with the completion marker is read,
one without is resumed, and an evaluation starts when the run that it evaluates is finished. With --launcher submitit
each run is a job of a SLURM array, with its evaluations behind it; stop this program or not, the jobs go on, and the
same command waits for them and submits what is missing.

Written are STEM.md, STEM.csv (unrounded) and STEM.tex (booktabs). A cell is the mean over seeds (standard deviation)
± half of Student's 95 % interval (of two seeds: of their range), bold only if it is better than each other one of its
column by a paired t-test over seeds at the 5 % level. Methods that train nothing are run once.

Exit codes: 0 done; 1 a run failed (named on stderr, and its cell is left empty); 2 something given was wrong.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.utils import InputError
from dassl.utils.cli import SETUP_ERRORS, Parser, fail, run_main
from dlr_clip_cli.places import spoken
from scripts.lib.grid import Run, missing_runs
from scripts.lib.launch import add_launch_flags, run_them
from scripts.lib.methods import check_datasets, choose_methods, whole_numbers
from scripts.lib.protocol_plan import PLANS, SHIFTED, TRANSFER, Asked, Cell, runs_of, suitable, transductive_methods
from scripts.lib.protocol_table import NOTES, cells_of, write_tables


def names(text: str) -> list[str]:
    """Split "a,b" into ["a", "b"]."""
    return [part.strip() for part in text.split(",") if part.strip()]


def shares(text: str) -> list[float]:
    """Convert "0,0.2" to [0.0, 0.2]."""
    return [float(part) for part in names(text)]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; --source is another name of --dataset, of which cross-dataset and ood take one."""
    parser = Parser(add_help=False)  # the flags of every protocol
    parser.add_argument("--trainers", default="", help="TRAINER[:CONFIG][@VARIANT], separated by commas")
    parser.add_argument("--config", default="tiny", help="name of the configs in configs/trainers/*/ (default: tiny)")
    parser.add_argument("--dataset", "--source", type=names, default=[], help="configs/datasets/*.yaml")
    parser.add_argument("--targets", type=names, default=[], help="datasets to evaluate on: cross-dataset, ood")
    parser.add_argument("--shots", type=whole_numbers, default=[16], help="labeled images per class (default: 16)")
    parser.add_argument("--seeds", type=whole_numbers, default=[1, 2, 3], help="separated by commas (default: 1,2,3)")
    parser.add_argument("--groups", type=names, default=[], help="ablation: groups of variants (default: all)")
    parser.add_argument("--noise", type=shares, default=[], help="label-noise: wrong labels (default: 0,0.2,0.4,0.6)")
    parser.add_argument("--foreign", default="", help="label-noise: wrong are images of this dataset, not labels")
    parser.add_argument("--tasks", type=int, help="transductive: tasks; a tenth as many streams (default: 1000)")
    parser.add_argument("--heads", choices=("main", "all"), help="rows of the table (default: all for ood, else main)")
    parser.add_argument("--root", help="folder that holds the datasets")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of all runs (default: output)")
    parser.add_argument("--write", type=Path, metavar="STEM", help="files to write (default: below OUTPUT/tables)")
    add_launch_flags(parser)
    parser.add_argument("--train-only", action="store_true", help="leave out what evaluates other runs")
    parser.add_argument("--read-only", action="store_true", help="start no run; make the table of what is there")
    parser.add_argument("--dry-run", action="store_true", help="print the runs that are missing, and start none")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config pairs for every run")
    whole = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    protocols = whole.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL", help=", ".join(PLANS))
    for name in PLANS:
        protocols.add_parser(name, parents=[parser], description=NOTES[name])
    return whole.parse_args(argv)


def make_plan(args: argparse.Namespace) -> tuple[Asked, list[Cell], list[str]]:
    """Return what is asked for, the cells of its table, and a sentence on each method that is left out.

    Raises:
        InputError: something given was wrong.
    """
    protocol = args.protocol
    moves = protocol in ("cross-dataset", "ood")
    if args.jobs is not None and args.jobs < 1:
        raise InputError(f"Expected --jobs to be at least 1 but got {args.jobs}")
    if len(args.opts) % 2:
        raise InputError(f"Expected KEY VALUE pairs but {args.opts[-1]} has no value")
    if protocol not in ("few-shot", "label-noise") and len(args.shots) != 1:
        raise InputError(f"Expected one number of shots for {protocol} but got {args.shots}")
    datasets = args.dataset or (["shapes"] if protocol in ("base2new", "cross-dataset", "ood") else ["digits"])
    if moves and len(datasets) != 1:
        raise InputError(f"Expected one dataset to train on (--source) for {protocol} but got {', '.join(datasets)}")
    targets = args.targets
    if moves and not targets:
        known = SHIFTED if protocol == "ood" else TRANSFER
        if datasets[0] not in known:
            raise InputError(f"Expected --targets for {datasets[0]}: there are usual ones for {', '.join(known)} only")
        targets = list(known[datasets[0]])
    elif targets and not moves:
        raise InputError(f"Expected no --targets for {protocol} but got {', '.join(targets)}")
    if args.groups and protocol != "ablation":
        raise InputError(f"Expected no --groups for {protocol} but got {', '.join(args.groups)}")
    if args.noise and protocol != "label-noise":
        raise InputError(f"Expected no --noise for {protocol} but got {', '.join(map(str, args.noise))}")
    noise = list(dict.fromkeys(args.noise)) or [0.0, 0.2, 0.4, 0.6]
    if not all(0 <= share < 1 for share in noise):
        raise InputError(f"Expected --noise to be shares, at least 0 and below 1, but got {', '.join(map(str, noise))}")
    if args.foreign and (protocol != "label-noise" or args.foreign in datasets):
        raise InputError(f"Expected --foreign with label-noise only, and another dataset, but got {args.foreign}")
    if args.tasks is not None and (protocol != "transductive" or args.tasks < 1):
        wanted = "at least 1" if protocol == "transductive" else f"left out for {protocol}"
        raise InputError(f"Expected --tasks to be {wanted} but got {args.tasks}")
    check_datasets([*datasets, *targets, *([args.foreign] if args.foreign else [])])
    if protocol == "transductive" and not args.trainers:
        methods = transductive_methods(args.config)
    else:
        methods = choose_methods(args.trainers or ("DLRCLIP" if protocol == "ablation" else ""), args.config)
    asked = Asked(
        methods,
        datasets,
        args.shots,
        args.seeds,
        args.output,
        ("--root", args.root) if args.root else (),
        tuple(args.opts),
        targets,
        args.groups,
        noise if protocol == "label-noise" else (),
        args.foreign,
        args.tasks or 1000,
    )
    methods, left_out = suitable(asked, protocol in ("base2new", "cross-dataset"), must=bool(args.trainers))
    asked = Asked(**{**vars(asked), "methods": methods})
    return asked, PLANS[protocol](asked), left_out


def print_plan(runs: Sequence[Run]) -> None:
    """Print the command of each missing run, an evaluation after the run that it evaluates."""
    missing = missing_runs(runs)
    for run in missing:
        print(f"{spoken('train')} {shlex.join(run.arguments())}")
    print(f"# {len(missing)} of {len(runs)} runs are missing")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the runs are stopped too
    try:
        asked, plan, left_out = make_plan(args)
        for sentence in left_out:
            print(sentence, file=sys.stderr)
        runs = [run for run in runs_of(plan) if run.after is None or not args.train_only]
        if args.dry_run:
            print_plan(runs)
            return 0
        failed = [] if args.read_only else run_them(runs, args)
        all_heads = args.heads == "all" or (args.heads is None and args.protocol == "ood")
        cells = cells_of(args.protocol, plan, asked.targets, all_heads)
        if not cells:
            raise InputError(f"Expected finished runs below {args.output} but there is none")
        command = shlex.join(["python", "scripts/protocol.py", *(sys.argv[1:] if argv is None else argv)])
        stem = args.write or args.output / "tables" / f"{args.protocol}_{'_'.join(asked.datasets)}"
        print(write_tables(cells, NOTES[args.protocol], command, stem))
        print(f"Written: {stem}.md, .csv, .tex")
    except SETUP_ERRORS as error:
        return fail(error, args.debug)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_main(main))

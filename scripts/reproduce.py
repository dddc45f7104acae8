"""Reproduce published numbers of a method: check, run, and put ours beside the published ones.

    python scripts/reproduce.py DLRCLIP --root DATA --shots 16 --datasets dtd,eurosat
    python scripts/reproduce.py MaPLe --root DATA --protocol base2new

Which numbers there are is in published/*.csv: with few shots of all classes, and in base-to-new. First the weights and
the images are checked, and what is missing is said, with where to get it. Then a few steps are timed on each dataset,
and the whole time is estimated. Then zero-shot CLIP is run: where it differs from the published one by more than 0.3
points, weights, images or prompts are others, and nothing is trained. Then each published run is made with the method's
own configuration, but for what its source has set otherwise (published/settings.csv), last epoch; what its source chose
on test images is chosen on validation images here (docs/METHODS.md). The same command goes on where it was stopped.

Exit codes: 0 done; 1 a run failed, or zero-shot CLIP differs; 2 something is missing or was given wrong.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.utils import InputError, atomic_write, did_you_mean
from dassl.utils.cli import SETUP_ERRORS, Parser, fail, run_main
from scripts.lib.grid import Run, few_shot_run, missing_runs
from scripts.lib.launch import add_launch_flags, run_them
from scripts.lib.methods import Method, choose_methods, whole_numbers
from scripts.lib.protocol_plan import SOURCE_OF, Asked, base2new, transfer
from scripts.lib.published import (
    AVERAGES,
    Ours,
    Pair,
    Published,
    full_name,
    ours_of,
    pair_table,
    pairs,
    read_published,
)
from scripts.lib.published_settings import PROTOCOLS, Settings, pairs_for, read_settings
from scripts.lib.readiness import check_ready, seconds_of_runs
from trainers.app.configuration import default_cfg

ZEROSHOT = "ZeroshotCLIP"
TOLERANCE = 0.3  # points by which zero-shot CLIP may differ
SEEDS = (1, 2, 3)  # where the source does not tell


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", metavar="METHOD", help="TRAINER or TRAINER@VARIANT")
    parser.add_argument("--config", default="vit_b16", help="name of its configuration (default: vit_b16)")
    parser.add_argument("--datasets", type=lambda text: text.split(","), default=[], help="default: all published")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="default: all published")
    parser.add_argument("--shots", type=whole_numbers, default=[], help="default: all published")
    parser.add_argument("--seeds", type=whole_numbers, default=[], help="default: the published ones, else 1,2,3")
    parser.add_argument("--root", help="folder that holds the datasets")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of all runs (default: output)")
    parser.add_argument("--published", type=Path, help="folder of CSV files (default: the project's)")
    add_launch_flags(parser)
    parser.add_argument("--check-only", action="store_true", help="check and estimate, and start no run")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config pairs for every run")
    return parser.parse_intermixed_args(argv)  # the method comes first, and the pairs last


class Planned(NamedTuple):
    """Hold a run, and the classes that it is tested on: all, base or new."""

    run: Run
    classes: str


def protocol_of(one: Published | Planned) -> str:
    """Return the protocol of a published number or of a run, one of PROTOCOLS."""
    return "few-shot" if one.classes == "all" else "base2new"


def wanted(args: argparse.Namespace, method: Method, published: Sequence[Published]) -> list[Published]:
    """Return the published numbers to reproduce.

    Raises:
        InputError: there are none.
    """
    cfg = default_cfg()
    cfg.merge_from_file(str(method.config))
    backbone, name = cfg.MODEL.BACKBONE.NAME, full_name(method.trainer, method.variant)
    there = [one for one in published if one.backbone == backbone and args.protocol in (None, protocol_of(one))]
    mine = [one for one in there if one.method == name]
    if not mine:
        names = sorted({one.method for one in there})
        raise InputError(
            f"Expected published numbers of {name} with {backbone} but there are none{in_protocol(args)}; there are "
            f"some of {', '.join(names) or 'no method'}{did_you_mean(name, names)}"
        )
    found = [
        one
        for one in mine
        if (not args.shots or one.shots in args.shots)
        and (not args.datasets or set(AVERAGES.get(one.dataset, (one.dataset,))) <= set(args.datasets))
    ]
    if not found:
        sets = sorted({one.dataset for one in mine})
        shots = sorted({one.shots for one in mine})
        raise InputError(
            f"Expected datasets of {', '.join(sets)} and shots of {', '.join(map(str, shots))}, which are published "
            f"for {name}{in_protocol(args)}, but got {', '.join(args.datasets) or 'all'} and "
            f"{', '.join(map(str, args.shots)) or 'all'}"
        )
    return found


def in_protocol(args: argparse.Namespace) -> str:
    """Return what an error says of the protocol that was asked for."""
    return f" in {args.protocol}" if args.protocol else ""


def runs_for(
    args: argparse.Namespace, method: Method, protocol: str, dataset: str, shots: int, seeds: Sequence[int],
    pairs_of_source: Sequence[str] = (),
) -> list[Planned]:  # fmt: skip
    """Return the runs of a protocol on a dataset; an evaluation stands behind the run that it evaluates.

    A shifted test set has no training images: the method is trained on the set's source, and evaluated on it.
    """
    flags = ("--root", args.root) if args.root else ()
    options = (*pairs_of_source, *args.opts)
    if dataset in SOURCE_OF:
        cells = transfer(Asked([method], [SOURCE_OF[dataset]], [shots], seeds, args.output, flags, options, [dataset]))
        return [Planned(cell.run, "all") for cell in cells if cell.column == dataset]
    if protocol == "few-shot":
        return [
            Planned(few_shot_run(method, dataset, shots, seed, output=args.output, flags=flags, options=options), "all")
            for seed in seeds
        ]
    cells = base2new(Asked([method], [dataset], [shots], seeds, args.output, flags, options))
    return [Planned(cell.run, str(cell.column)) for cell in cells]


def plan(
    args: argparse.Namespace, method: Method, known: Sequence[Published], settings: Sequence[Settings]
) -> list[Planned]:
    """Return the runs that the published numbers stand for, each once."""
    found: dict[Path, Planned] = {}
    for one in known:
        for dataset in AVERAGES.get(one.dataset, (one.dataset,)):
            protocol, shots = protocol_of(one), max(one.shots, 1)
            theirs = pairs_for(settings, one.method, protocol, one.shots, SOURCE_OF.get(dataset, dataset))
            for planned in runs_for(args, method, protocol, dataset, shots, args.seeds or one.seeds or SEEDS, theirs):
                found.setdefault(planned.run.folder, planned)
    return list(found.values())


def tell_settings(plans: Sequence[Planned], known: Sequence[Published], settings: Sequence[Settings]) -> None:
    """Print the settings of the source that differ from the configuration."""
    trained_on = {(run.after or run).dataset for run, _ in plans}
    told = {
        (one.method, one.protocol, one.shots, one.dataset): one
        for one in settings
        if any(one.holds_for(number.method, protocol_of(number)) for number in known)
        and one.dataset in ("", *trained_on)
        and one.shots in (None, *(number.shots for number in known))
    }
    for one in told.values():
        where = [one.method, one.protocol, one.dataset, "" if one.shots is None else f"{one.shots} shots"]
        print(f"as in {one.source}: {', '.join(filter(None, where))}: {shlex.join(one.pairs)}", flush=True)


def numbers(plans: Sequence[Planned], variant: str = "") -> list[Ours]:
    """Return the accuracy of every head of the finished runs."""
    found = [(run, classes, run.metrics()) for run, classes in plans]
    return [
        one
        for run, classes, metrics in found
        if metrics is not None
        for one in ours_of(metrics, run.dataset, variant, classes)
    ]


def zero_shot(
    args: argparse.Namespace, plans: Sequence[Planned], published: Sequence[Published], settings: Sequence[Settings]
) -> tuple[list[Pair], int]:
    """Run zero-shot CLIP on the datasets of the runs; return its numbers beside published ones, and how many failed."""
    (method,) = choose_methods(ZEROSHOT, args.config)
    mine = []
    for dataset, protocol in dict.fromkeys((one.run.dataset, protocol_of(one)) for one in plans):
        theirs = pairs_for(settings, ZEROSHOT, protocol, 0, SOURCE_OF.get(dataset, dataset))
        mine += runs_for(args, method, protocol, dataset, 1, [1], theirs)
    failed = run_them([one.run for one in mine], args)
    return pairs(numbers(mine), [one for one in published if one.method == ZEROSHOT]), len(failed)


def tell_estimate(seconds: dict[str, float], runs: Sequence[Run]) -> None:
    """Print the time that the missing runs will take, by dataset."""
    count = {name: sum(run.dataset == name for run in runs) for name in seconds}
    rows = [
        [name, count[name], f"{seconds[name] / count[name]:.0f}", f"{seconds[name] / 3600:.1f}"] for name in seconds
    ]
    rows.append(["all", len(runs), "", f"{sum(seconds.values()) / 3600:.1f}"])
    print(tabulate(rows, ["dataset", "runs to make", "seconds of a run", "hours"], disable_numparse=True))
    print("Estimated from a few training steps; one run at a time, reading and testing left out.", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the runs are stopped too
    try:
        if len(args.opts) % 2:
            raise InputError(f"Expected KEY VALUE pairs but {args.opts[-1]} has no value")
        (method,) = choose_methods(args.method, args.config)
        published = read_published(args.published)
        known = wanted(args, method, published)
        settings = read_settings(args.published)
        plans = plan(args, method, known, settings)
        runs = [run for one in plans for run in (one.run.after, one.run) if run is not None]
        runs = list({run.folder: run for run in runs}.values())
        for line in check_ready(runs, args.root):
            print(line, flush=True)
        protocols = {protocol_of(one) for one in known}
        checked = [one for one in published if one.method == ZEROSHOT and protocol_of(one) in protocols]
        tell_settings(plans, [*known, *checked], settings)
        missing = [run for run in missing_runs(runs) if run.after is None]
        if missing:
            tell_estimate(seconds_of_runs(missing), missing)
        if args.check_only:
            return 0
        first, failed = zero_shot(args, plans, published, settings)
        others = [pair for pair in first if abs(pair.difference) > TOLERANCE]
        if first:
            print(pair_table(first), flush=True)
        if failed or others:
            for pair in others:
                print(
                    f"error: Expected zero-shot CLIP within {TOLERANCE} points of the published "
                    f"{pair.known.accuracy:.1f} % on {pair.known.dataset} ({pair.known.classes} classes) but got "
                    f"{pair.values[0]:.1f} %: weights, images or prompts are others",
                    file=sys.stderr,
                )
            agreeing = sorted({run.dataset for run, _ in plans} - {pair.known.dataset for pair in others})
            if others and agreeing:
                print(f"To go on without: --datasets {','.join(agreeing)}", file=sys.stderr)
            return 1
        bad = run_them(runs, args)
        table = pair_table(pairs(numbers(plans, method.variant), known))
        path = args.output / "reproduced" / f"{full_name(method.trainer, method.variant)}_{args.config}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as stream:
            stream.write(table)
        print(table)
        print(f"Written: {path}")
    except SETUP_ERRORS as error:
        return fail(error, args.debug)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_main(main))

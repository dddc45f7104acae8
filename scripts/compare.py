"""Methods side by side: runs what is missing, reads what is there, and writes tables and a figure.

    python scripts/compare.py --dataset digits --shots 1,2,4,8,16 --seeds 1,2,3 --trainers DLRCLIP,TipAdapterF,CoOp

Each run is `train.py` with the method's config of the given name (`--config tiny`: configs/trainers/*/tiny.yaml) and
lies where train.py puts it; one that was cut short is resumed. A method may have a config of its own,
`LinearProbe:tiny_text`, or be a variant of scripts/lib/ablations.py, `DLRCLIP@cma+glr`; `DLRCLIP:tiny_plus/final` shows
another head than the main one of the same run. KEY VALUE pairs at the end go to every run. Without --trainers: every
method that has such a config and leaves the dataset open.

Written are STEM.md, STEM.csv (unrounded), STEM.tex (booktabs), STEM_runs.csv (a row per run) and the figure STEM.pdf
and .png (accuracy by shots, a panel per dataset and one for the average). A cell is the mean over seeds (standard
deviation) ± half of Student's 95 % interval (of two seeds: of their range). The best of a column is bold only if it is
better than each of the others by a paired t-test over seeds at the 5 % level: the seeds' few-shot images are the same
for all methods. Three seeds rarely suffice for that. `--lead METHOD` adds a table that compares this method with the
best other one, seed by seed. Where published/ has a number for the same method, backbone, dataset and number of shots,
a table has it beside ours.

`--with FILES` reads the STEM_runs.csv of other calls, or of other machines: a run that is in one of them, and is not
finished here, is not run.

Exit codes: 0 done; 1 a run failed (named on stderr, and its cell is left empty); 2 something given was wrong.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.utils import InputError, atomic_write
from dassl.utils.cli import SETUP_ERRORS, Parser, fail, run_main
from scripts.figures.plot_shots import shots_figure
from scripts.figures.style import save
from scripts.lib.grid import Run, few_shot_run, run_missing
from scripts.lib.lead import lead_table
from scripts.lib.methods import check_datasets, choose_methods, name_parts, whole_numbers
from scripts.lib.published import Ours, ours_of, pair_table, pairs, read_published
from scripts.lib.run_list import METRICS, FinishedRun, Key, check_same_images, read_lists, write_list
from scripts.lib.tables import SPREAD, Record, collect, comma_separated, latex, markdown

SHOTS_HELP = "labeled images per class, separated by commas (default: 1,2,4,8,16)"
WITH_HELP = "STEM_runs.csv of other calls, separated by commas; runs that are in them are not run"


def paths(text: str) -> list[Path]:
    """Split "a,b" into paths."""
    return [Path(part) for part in text.split(",") if part]


def plan(args: argparse.Namespace) -> list[Run]:
    """Return all runs of the comparison.

    Raises:
        InputError: something given was wrong.
    """
    check_datasets(args.dataset)
    if len(args.opts) % 2:
        raise InputError(f"Expected KEY VALUE pairs but {args.opts[-1]} has no value")
    flags = ("--root", args.root) if args.root else ()
    return [
        few_shot_run(method, dataset, shots, seed, output=args.output, flags=flags, options=args.opts)
        for dataset in args.dataset
        for method in choose_methods(args.trainers, args.config, heads=True)
        for shots in args.shots
        for seed in args.seeds
    ]


def read_runs(
    runs: Sequence[Run], known: Mapping[Key, FinishedRun], options: str
) -> tuple[list[FinishedRun], list[Ours]]:
    """Return the finished runs, in order; of those that are not here, the ones that are known from elsewhere.

    The second list has the accuracy of every head of the runs that are here, to be put beside published numbers.

    Raises:
        InputError: a run does not have the head that is asked for, or runs on one dataset are of different images.
    """
    finished, ours = [], []
    for run in runs:
        found = run.metrics()
        if found is None:
            if key_of(run) in known:
                finished.append(known[key_of(run)])
            continue
        results = found[found["split"]]
        head = run.head or results["main"]
        if head not in results["heads"]:
            raise InputError(f"Expected {run.method} to have one of the heads {', '.join(results['heads'])}")
        variant = name_parts(run.method).variant
        ours += ours_of(found, run.dataset, variant)
        finished.append(
            FinishedRun(
                dataset=found["dataset"],
                dataset_config=run.dataset,
                method=run.method,
                shots=run.shots,
                seed=run.seed,
                **{metric: results["heads"][head][metric] for metric in METRICS},
                trainable=found["params"]["trainable"],
                seconds=found["timing"].get("train_seconds", 0.0),
                recipe=int(found.get("recipe", 1)),
                data=str(found.get("data_digest") or ""),
                options=options,
            )
        )
    check_same_images(finished)
    return finished, ours


def key_of(run: Run) -> Key:
    """Return what tells a run from the others of a comparison."""
    return run.dataset, run.method, run.shots, run.seed


def cost_table(runs: Sequence[FinishedRun]) -> str:
    """Return Markdown of the trained parameters and median training seconds, at the largest number of shots."""
    shots = max(run.shots for run in runs)
    rows: dict[str, list[str]] = {}
    names = list(dict.fromkeys(run.dataset for run in runs))
    for method in dict.fromkeys(run.method for run in runs):
        rows[method] = [method]
        for name in names:
            cell = [run for run in runs if (run.method, run.dataset, run.shots) == (method, name, shots)]
            trainable = f"{cell[0].trainable:,}" if cell else ""
            rows[method] += [trainable, f"{statistics.median(run.seconds for run in cell):.1f}" if cell else ""]
    heads = ["method", *(f"{name}: {what}" for name in names for what in ("parameters", "seconds"))]
    align = ["left", *["right"] * (len(heads) - 1)]
    table = tabulate(list(rows.values()), heads, tablefmt="pipe", disable_numparse=True, colalign=align)
    return f"### trained parameters and training time at {shots} shots (median over seeds)\n\n{table}\n"


def write_results(
    runs: Sequence[FinishedRun],
    stem: Path,
    metric: str,
    command: str,
    lead: str = "",
    beside: str = "",
) -> str:
    """Write the tables and the figure; return the Markdown.

    Args:
        runs: the finished runs.
        stem: of the files.
        metric: which of METRICS is shown.
        command: that made them.
        lead: a method to compare with the best other one; "": none.
        beside: a further table.
    """
    records = [Record(run.dataset, run.method, run.shots, run.seed, getattr(run, metric)) for run in runs]
    cells = collect(records)
    higher = metric != "ece"
    head = f"{metric} (%), {SPREAD}\n\n    {command}\n"
    leads = [lead_table(cells, lead, higher)] if lead else []
    text = "\n".join([head, markdown(cells, higher), *leads, *([beside] if beside else []), cost_table(runs)])
    for suffix, content in ((".md", text), (".csv", comma_separated(cells, higher)), (".tex", latex(cells, higher))):
        with atomic_write(stem.with_name(stem.name + suffix)) as stream:
            stream.write(content)
    write_list(runs, stem.with_name(f"{stem.name}_runs.csv"))
    shown = [{**r._asdict(), "accuracy": r.value} for r in records]
    save(shots_figure(shown), stem)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=lambda s: s.split(","), default=["digits"], help="configs/datasets/*.yaml")
    parser.add_argument("--shots", type=whole_numbers, default=[1, 2, 4, 8, 16], help=SHOTS_HELP)
    parser.add_argument("--seeds", type=whole_numbers, default=[1, 2, 3], help="separated by commas (default: 1,2,3)")
    parser.add_argument("--trainers", default="", help="names, each perhaps with :CONFIG")
    parser.add_argument("--config", default="tiny", help="name of the configs in configs/trainers/*/ (default: tiny)")
    parser.add_argument("--metric", choices=METRICS, default="accuracy")
    parser.add_argument("--lead", default="", metavar="METHOD", help="compare this one with the best other method")
    parser.add_argument("--root", help="folder that holds the datasets")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of all runs (default: output)")
    parser.add_argument("--write", type=Path, metavar="STEM", help="files to write (default: OUTPUT/compare/DATASETS)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a run (default: see docs/PROTOCOLS.md)")
    parser.add_argument("--with", dest="lists", type=paths, default=[], metavar="FILES", help=WITH_HELP)
    parser.add_argument("--read-only", action="store_true", help="start no run; make the tables of what is there")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config pairs for every run")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the runs are stopped too
    try:
        if args.jobs < 1:
            raise InputError(f"Expected --jobs to be at least 1 but got {args.jobs}")
        runs, options = plan(args), shlex.join(args.opts)
        known = read_lists(args.lists, options)
        wanted = [run for run in runs if key_of(run) not in known]
        failed = [] if args.read_only else run_missing(wanted, args.jobs, args.threads)
        finished, ours = read_runs(runs, known, options)
        if not finished:
            raise InputError(f"Expected finished runs below {args.output} but there is none")
        command = shlex.join(["python", "scripts/compare.py", *(sys.argv[1:] if argv is None else argv)])
        stem = args.write or args.output / "compare" / "_".join(args.dataset)
        stem.parent.mkdir(parents=True, exist_ok=True)
        whole = args.metric == "accuracy" and "DATASET.SUBSAMPLE_CLASSES" not in args.opts
        beside = pair_table(pairs(ours, read_published())) if whole else ""
        print(write_results(finished, stem, args.metric, command, args.lead, beside))
        print(f"Written: {stem}.md, .csv, .tex, .pdf, .png, {stem}_runs.csv")
    except SETUP_ERRORS as error:
        return fail(error, args.debug)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_main(main))

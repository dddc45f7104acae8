"""Mean results of the runs in a folder, in the form of CoOp's parse_test_res.py.

    python scripts/parse_results.py output/digits/DLRCLIP/tiny_16shots [--ci95] [--test-log] [--multi-exp]
                                    [--keyword accuracy]

Every entry of the folder is a run: `seed1`, `seed2`, ... With --multi-exp every entry is such a folder. A run's
numbers come from `metrics.json`, which is unrounded, and of runs of other programs from `log.txt`: the last result
after the line "Finish training", or, with --test-log, after "=> result". The spread is the standard deviation (n) or,
with --ci95, 1.96 standard errors of the mean. Keywords: accuracy, error, macro_f1, and what metrics.json has beside
(top5, ece) or a log does (average, of per-class results).

Entries that are no finished run, and evaluations where training runs are wanted, are named on stderr and left out.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.utils.cli import fail, run_main
from scripts.lib.runs import read_metrics

TRAINED, TESTED = "Finish training", "=> result"


class LeftOut(Exception):
    """An entry is not counted; the message says why."""


def run_result(folder: Path, keyword: str, test_log: bool = False, head: str = "") -> tuple[Path, float]:
    """Return (the file that was read, the result in percent) of a run.

    Args:
        folder: of the run.
        keyword: accuracy, error, ...
        test_log: True: evaluations count as well as training runs.
        head: name of a head in metrics.json; "": the one whose accuracy is the method's.

    Raises:
        LeftOut: the folder is no finished run of the kind that is wanted.
        ValueError: the run has no such result.
    """
    path, log = folder / "metrics.json", folder / "log.txt"
    ours = path.is_file() or (folder / "environment.json").is_file()
    if ours and not (path.is_file() and (folder / "DONE").is_file()):
        raise LeftOut("it has not finished")
    if not ours:
        if not log.is_file():
            raise LeftOut("it has neither metrics.json nor log.txt")
        return log, log_result(log, keyword, TESTED if test_log else TRAINED)
    metrics = read_metrics(path)
    if metrics.get("mode") == "eval" and not test_log:
        raise LeftOut("it is an evaluation (--test-log counts it)")
    tested = metrics.get(metrics.get("split", "test"), {})
    heads, wanted = tested.get("heads", {}), head or tested.get("main")
    values = heads.get(wanted)
    if values is None:
        raise ValueError(f"Expected {path} to have a head out of {', '.join(heads) or 'none'} but got {wanted}")
    values = {**values, **({"error": 100.0 - values["accuracy"]} if "accuracy" in values else {})}
    if keyword in values:
        return path, values[keyword]
    if log.is_file() and not head:
        return log, log_result(log, keyword, TESTED if test_log else TRAINED)
    raise ValueError(f"Expected --keyword to be one of {', '.join(values)} but got {keyword}: {path}")


def log_result(path: Path, keyword: str, start: str) -> float:
    """Return the last "* <keyword>: <number>%" of a log after the first line that is `start`."""
    pattern = re.compile(rf"\* {re.escape(keyword)}: ([\d.eE+-]+)%")
    started, result = False, None
    with open(path, encoding="utf-8", errors="replace") as stream:
        for line in stream:
            started = started or line.strip() == start
            match = pattern.search(line) if started else None
            if match:
                result = float(match[1])
    if not started:
        raise LeftOut(f'its log.txt has no line "{start}"')
    if result is None:
        raise LeftOut(f'its log.txt has no "{keyword}" after "{start}"')
    return result


def spread(values: Sequence[float], ci95: bool) -> float:
    """Return the standard deviation (n), or, with `ci95`, 1.96 times it divided by the square root of n."""
    sd = statistics.pstdev(values)
    return 1.96 * sd / math.sqrt(len(values)) if ci95 else sd


def summarize(folder: Path, args: argparse.Namespace) -> float:
    """Print the runs of a folder and their mean; return the mean."""
    print(f"Parsing files in {folder}")
    values = []
    for entry in entries(folder):
        try:
            path, value = run_result(entry, args.keyword, args.test_log, args.head)
        except LeftOut as reason:
            print(f"left out: {entry}: {reason}", file=sys.stderr)
            continue
        print(f"file: {path}. {args.keyword}: {value:.2f}%. ")
        values.append(value)
    if not values:
        raise ValueError(f"Expected finished runs in {folder} but found none")
    mean = statistics.fmean(values)
    print(f"===\nSummary of directory: {folder}")
    print(f"* {args.keyword}: {mean:.2f}% +- {spread(values, args.ci95):.2f}%\n===")
    return mean


def entries(folder: Path) -> list[Path]:
    """Return what a folder holds, sorted, without hidden entries."""
    if not folder.is_dir():
        raise ValueError(f"Expected a folder of runs but got {folder}")
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="folder of runs")
    parser.add_argument("--ci95", action="store_true", help="1.96 standard errors instead of the standard deviation")
    parser.add_argument("--test-log", action="store_true", help="count evaluations, too")
    parser.add_argument("--multi-exp", action="store_true", help="folder of folders of runs")
    parser.add_argument("--keyword", default="accuracy", help="which result (default: accuracy)")
    parser.add_argument("--head", default="", help="which classifier (default: the method's own accuracy)")
    args = parser.parse_args(argv)
    try:
        if not args.multi_exp:
            summarize(args.directory, args)
            return 0
        means = []
        for folder in entries(args.directory):
            if folder.is_dir():
                means.append(summarize(folder, args))
            else:
                print(f"left out: {folder}: it is no folder", file=sys.stderr)
        if not means:
            raise ValueError(f"Expected folders of runs in {args.directory} but found none")
        print(f"Average performance\n* {args.keyword}: {statistics.fmean(means):.2f}%")
    except (ValueError, OSError) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

"""Mean test accuracy of every head over the seeds of finished runs, as a Markdown table.

    python scripts/heads_table.py output/digits/DLRCLIP

Reads `metrics.json` below the given folders, of runs with the completion marker only. One row per dataset, trainer and
number of shots; a cell is the mean and, in brackets, the standard deviation (n - 1) over runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.utils.cli import fail, run_main
from scripts.lib.runs import find_runs, run_records


def finished_runs(folders: list[Path]) -> list[dict[str, Any]]:
    """Return `metrics.json` of every finished run below `folders`, in path order.

    Raises:
        ValueError: no finished run was found, or two runs share dataset, trainer, shots and seed.
    """
    runs, _ = find_runs(folders)
    if not runs:
        raise ValueError(f"Expected finished runs below {', '.join(map(str, folders))} but found none")
    run_records(runs)  # each dataset, trainer, number of shots and seed once
    return [run.metrics for run in runs]


def cell(values: list[float]) -> str:
    """Return the mean as text, with the standard deviation where there are several values."""
    spread = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def table(runs: list[dict[str, Any]], metric: str = "accuracy") -> str:
    """Return the Markdown table; cells of heads that a trainer lacks are empty."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        groups[run["dataset"], run["trainer"], run["shots"]].append(run)
    heads = list(dict.fromkeys(head for run in runs for head in run["test"]["heads"]))
    rows = []
    for (dataset, trainer, shots), members in sorted(groups.items()):
        row: list[Any] = [dataset, trainer, shots, len(members)]
        for head in heads:
            values = [run["test"]["heads"][head][metric] for run in members if head in run["test"]["heads"]]
            row.append(cell(values) if values else "")
        rows.append(row)
    return tabulate(rows, ["dataset", "trainer", "shots", "seeds", *heads], tablefmt="pipe", disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold run folders, at any depth")
    parser.add_argument("--metric", choices=("accuracy", "top5", "macro_f1", "ece"), default="accuracy")
    args = parser.parse_args(argv)
    try:
        print(table(finished_runs(args.folders), args.metric))
    except (ValueError, OSError) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

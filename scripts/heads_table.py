"""Mean test accuracy of every head over the seeds of finished runs, as a Markdown table.

    python scripts/heads_table.py output/digits/DLRCLIP

Reads `metrics.json` below the given folders, of runs with the completion marker only. One row per dataset, trainer and
number of shots; a cell is the mean and, in brackets, the standard deviation (n - 1) over runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from tabulate import tabulate


def finished_runs(folders: list[Path]) -> list[dict[str, Any]]:
    """`metrics.json` of every finished run below `folders`, in path order.

    Raises:
        ValueError: no finished run was found, or two runs share dataset, trainer, shots and seed.
    """
    paths = sorted(
        path for folder in folders for path in folder.rglob("metrics.json") if (path.parent / "DONE").exists()
    )
    if not paths:
        raise ValueError(f"Expected finished runs below {', '.join(map(str, folders))} but found none")
    runs, seen = [], {}
    for path in paths:
        run = json.loads(path.read_text(encoding="utf-8"))
        key = run["dataset"], run["trainer"], run["shots"], run["seed"]
        if key in seen:
            raise ValueError(f"Expected one run of {key} but got {seen[key]} and {path}")
        seen[key] = path
        runs.append(run)
    return runs


def cell(values: list[float]) -> str:
    """Mean, and standard deviation where there are several values."""
    spread = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def table(runs: list[dict[str, Any]], metric: str = "accuracy") -> str:
    """Markdown; heads that a trainer lacks are left empty."""
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold run folders, at any depth")
    parser.add_argument("--metric", choices=("accuracy", "top5", "macro_f1", "ece"), default="accuracy")
    args = parser.parse_args()
    try:
        print(table(finished_runs(args.folders), args.metric))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

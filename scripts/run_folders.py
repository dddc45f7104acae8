"""Finding the folders of runs, and the numbers in them.

A run's folder has `config.yaml` from its start, `metrics.json` when it has been tested, and `DONE` last of all.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

RECORD = ("dataset", "method", "shots", "seed", "accuracy")


class Run(NamedTuple):
    """A finished run."""

    folder: Path
    metrics: dict[str, Any]  # metrics.json
    label: str = ""  # name given on the command line

    @property
    def method(self) -> str:
        """The name of its method: the label, else the trainer."""
        return self.label or str(self.metrics["trainer"])

    @property
    def shots(self) -> int:
        """Training images per class; 0 for a zero-shot method, which looks at none; -1: all there are."""
        return 0 if str(self.metrics["trainer"]).lower().startswith("zeroshot") else int(self.metrics["shots"])

    def config(self) -> dict[str, Any]:
        """Its resolved configuration; empty where the file is not there."""
        path = self.folder / "config.yaml"
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def dataset(self) -> str:
        """The dataset; with a part of its classes: "Digits (base)"."""
        part = self.config().get("DATASET", {}).get("SUBSAMPLE_CLASSES", "all")
        name = str(self.metrics["dataset"])
        return name if part == "all" else f"{name} ({part})"

    def heads(self) -> dict[str, dict[str, float]]:
        """Percentages by head, of the split it was tested on."""
        return self.metrics.get(self.metrics.get("split", "test"), {}).get("heads", {})


def find_runs(places: Iterable[str | Path]) -> tuple[list[Run], list[Path]]:
    """(finished runs, folders of runs that have not finished), each in path order and once.

    Args:
        places: folders that hold run folders at any depth, or are some; "NAME=FOLDER" gives their method a name.

    Raises:
        ValueError: a place is no folder, or a metrics.json cannot be read.
    """
    finished: dict[Path, Run] = {}
    unfinished: dict[Path, None] = {}
    for place in places:
        label, folder = split_label(place)
        if not folder.is_dir():
            raise ValueError(f"Expected a folder of runs but got {folder}")
        marks = {path.parent for name in ("config.yaml", "metrics.json") for path in folder.rglob(name)}
        for run in sorted(marks):
            if (run / "DONE").is_file() and (run / "metrics.json").is_file():
                finished.setdefault(run.resolve(), Run(run, read_metrics(run / "metrics.json"), label))
            else:
                unfinished[run] = None
    return list(finished.values()), list(unfinished)


def split_label(place: str | Path) -> tuple[str, Path]:
    """("NAME", FOLDER) of "NAME=FOLDER"; without a name, or where such a folder exists, the name is ""."""
    text = str(place)
    label, equals, folder = text.partition("=")
    return (label, Path(folder)) if equals and not Path(text).exists() else ("", Path(text))


def read_metrics(path: Path) -> dict[str, Any]:
    """The content of a metrics.json."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected {path} to be JSON but got: {error}") from error
    missing = [key for key in ("trainer", "dataset", "shots", "seed") if key not in metrics]
    if missing:
        raise ValueError(f"Expected {path} to have {', '.join(missing)}, as a run writes it, but it has not")
    return metrics


def run_records(runs: Iterable[Run], heads: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Records {dataset, method, shots, seed, accuracy}, percent, of runs.

    Args:
        runs: finished ones; those that were not tested are left out.
        heads: take these heads, as methods called "<method> <head>"; without any: the accuracy of each run.

    Raises:
        ValueError: two runs share dataset, method, shots and seed, or no run has one of the heads.
    """
    found: dict[tuple[Any, ...], Path] = {}
    records = []
    seen: set[str] = set()
    for run in runs:
        values = {"": run.metrics.get("accuracy")}
        if heads:
            values = {head: run.heads()[head]["accuracy"] for head in heads if head in run.heads()}
            seen |= values.keys()
        for head, accuracy in values.items():
            if accuracy is None:
                continue
            key = (run.dataset(), f"{run.method} {head}".strip(), run.shots, int(run.metrics["seed"]))
            if key in found:
                raise ValueError(
                    f"Expected one run of {key[1]} on {key[0]} with {key[2]} shots and seed {key[3]} but got "
                    f"{found[key]} and {run.folder}: name fewer folders, or tell them apart as NAME=FOLDER"
                )
            found[key] = run.folder
            records.append(dict(zip(RECORD, (*key, float(accuracy)), strict=True)))
    missing = [head for head in heads if head not in seen]
    if missing:
        raise ValueError(f"Expected runs with the head {', '.join(missing)} but found none")
    return records


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a CSV file, for instance of published numbers.

    Its first line names the columns `dataset`, `method`, `shots`, `accuracy` (percent), in any order, and, where there
    is one line per run, `seed`; other columns are not read. `shots` is 0 for zero-shot and -1 for all images.

    Raises:
        ValueError: a column is missing or a value is no number; the message says where.
    """
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, skipinitialspace=True)
        columns = reader.fieldnames or ()
        missing = [name for name in RECORD if name != "seed" and name not in columns]
        if missing:
            raise ValueError(f"Expected {path} to have the column {', '.join(missing)} but it has {', '.join(columns)}")
        return [_record(row, f"{path}, line {reader.line_num}") for row in reader]


def _record(row: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        accuracy, shots = float(row["accuracy"]), int(row["shots"])
        seed = int(row["seed"]) if (row.get("seed") or "").strip() else None
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected numbers for shots, seed and accuracy but got {error} in {where}") from error
    if not math.isfinite(accuracy):
        raise ValueError(f"Expected accuracy to be a number but got {accuracy} in {where}")
    return {
        "dataset": row["dataset"].strip(),
        "method": row["method"].strip(),
        "shots": shots,
        "seed": seed,
        "accuracy": accuracy,
    }

"""Finding the folders of runs, and the numbers in them.

A run's folder has `config.yaml` from its start, `metrics.json` when it has been tested, and `DONE` last of all.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dassl.config import read_yaml
from dassl.utils import place_name

RECORD = ("dataset", "method", "shots", "seed", "accuracy")


def shots_of(metrics: Mapping[str, Any]) -> int:
    """Return the training images per class of a run; 0: a zero-shot method, which looks at none; -1: all there are."""
    return 0 if str(metrics["trainer"]).lower().startswith("zeroshot") else int(metrics["shots"])


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
        return shots_of(self.metrics)

    def config(self) -> dict[str, Any]:
        """Return the run's resolved configuration; empty where the file is not there."""
        path = self.folder / "config.yaml"
        return read_yaml(path) if path.is_file() else {}

    def environment(self) -> dict[str, Any]:
        """Return what the run noted of machine, command and time; empty where that file is not there."""
        try:
            told = json.loads((self.folder / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return told if isinstance(told, dict) else {}

    def dataset(self) -> str:
        """Return the dataset's name, like "Digits (base)" for a part of its classes.

        One's own images are called like their folder or CSV file.
        """
        node = self.config().get("DATASET", {})
        node = node if isinstance(node, dict) else {}
        part, name = node.get("SUBSAMPLE_CLASSES", "all"), str(self.metrics["dataset"])
        if name == "ImageFolder" and node.get("ROOT"):
            name = place_name(str(node["ROOT"])) or name
        return name if part == "all" else f"{name} ({part})"

    def heads(self) -> dict[str, dict[str, float]]:
        """Return percentages by head, on the split that the run was tested on."""
        return self.metrics.get(self.metrics.get("split", "test"), {}).get("heads", {})


def find_runs(places: Iterable[str | Path]) -> tuple[list[Run], list[Path]]:
    """Return (finished runs, folders of runs that have not finished), each in path order and once.

    Args:
        places: run folders, or folders that hold some at any depth; "NAME=FOLDER" gives their method a name.

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
    """Split "NAME=FOLDER" into ("NAME", FOLDER); without a name, or where such a folder exists, the name is ""."""
    text = str(place)
    label, equals, folder = text.partition("=")
    return (label, Path(folder)) if equals and not Path(text).exists() else ("", Path(text))


def read_metrics(path: Path) -> dict[str, Any]:
    """Read a metrics.json.

    Raises:
        ValueError: the file is unreadable, or not what a run writes.
    """
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected {path} to be JSON but got: {error}") from error
    keys = ("trainer", "dataset", "shots", "seed")
    missing = [key for key in keys if not isinstance(metrics, dict) or key not in metrics]
    if missing:
        raise ValueError(f"Expected {path} to have {', '.join(missing)}, as a run writes it, but it has not")
    fault = next(_faults(metrics), None)
    if fault:
        raise ValueError(f"Expected {path} to be as a run writes it but {fault}")
    return metrics


def _faults(metrics: dict[str, Any]) -> Iterator[str]:
    """Yield what in a metrics.json is of a kind that no run writes."""
    for key, kind in (("trainer", str), ("dataset", str), ("shots", int), ("seed", int), ("split", str)):
        if key in metrics and (not isinstance(metrics[key], kind) or isinstance(metrics[key], bool)):
            yield f"{key} is {metrics[key]!r:.80}"
    for key in ("params", "selected", "timing", "train"):
        if not isinstance(metrics.get(key, {}), dict):
            yield f"{key} is no object"
    if not _is_number(metrics.get("accuracy", 0.0)) and metrics["accuracy"] is not None:
        yield f"accuracy is {metrics['accuracy']!r:.80}"
    if any(not isinstance(choice, dict) for choice in dict(metrics.get("selected") or {}).values()):
        yield "selected holds other things than objects"
    if any(not _is_number(count) for count in dict(metrics.get("params") or {}).values()):
        yield "params holds other things than numbers"
    split = metrics.get("split", "test")
    tested = metrics.get(split, {}) if isinstance(split, str) else {}
    heads = tested.get("heads", {}) if isinstance(tested, dict) else None
    if not isinstance(heads, dict) or any(
        not isinstance(head, dict) or "accuracy" not in head or not all(map(_is_number, head.values()))
        for head in heads.values()
    ):
        yield f"{split} holds no heads with their numbers"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def each_once(runs: Iterable[Run]) -> list[Run]:
    """Return runs, of a zero-shot method on one dataset with one seed the first only, if all have the same numbers.

    Such a method looks at no training images: its runs with several numbers of shots are the same experiment.
    """
    kept: list[Run] = []
    first: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        if run.shots == 0:  # asked first: the dataset's name is read from a file
            known = first.setdefault((run.dataset(), run.method, run.metrics["seed"]), run)
            if known is not run and known.heads() == run.heads():
                continue
        kept.append(run)
    return kept


def run_records(runs: Iterable[Run], heads: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return records {dataset, method, shots, seed, accuracy in percent} of runs.

    Args:
        runs: finished runs; those that were not tested are left out.
        heads: take these heads, as methods called "<method> <head>"; without any: the accuracy of each run.

    Raises:
        ValueError: two runs share dataset, method, shots and seed, or no run has one of the heads.
    """
    found: dict[tuple[Any, ...], Path] = {}
    records = []
    seen: set[str] = set()
    for run in each_once(runs):
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
    """Read the records of a CSV file, for instance of published numbers.

    Its first line names the columns `dataset`, `method`, `shots`, `accuracy` (percent), in any order, and, where there
    is one line per run, `seed`; other columns are not read. `shots` is 0 for zero-shot and -1 for all images.

    Raises:
        ValueError: a column is missing or a value is no number; the message says where.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            columns = reader.fieldnames or ()
            missing = [name for name in RECORD if name != "seed" and name not in columns]
            if missing:
                found = ", ".join(columns) or "none"
                raise ValueError(f"Expected {path} to have the column {', '.join(missing)} but it has {found}")
            return [_record(row, f"{path}, line {reader.line_num}") for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"Expected {path} to be CSV in UTF-8 but got: {error}") from error


def _record(row: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        accuracy, shots = float(row["accuracy"]), int(row["shots"])
        seed = int(row["seed"]) if (row.get("seed") or "").strip() else None
        dataset, method = row["dataset"].strip(), row["method"].strip()
    except (TypeError, ValueError, AttributeError) as error:  # a line with too few cells has None in the others
        raise ValueError(f"Expected numbers for shots, seed and accuracy but got {error} in {where}") from error
    if not math.isfinite(accuracy):
        raise ValueError(f"Expected accuracy to be a number but got {accuracy} in {where}")
    return {
        "dataset": dataset,
        "method": method,
        "shots": shots,
        "seed": seed,
        "accuracy": accuracy,
    }

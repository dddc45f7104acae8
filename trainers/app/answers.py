"""Predictions as a table, CSV, JSON, and in result.txt."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from dassl.utils import InputError, atomic_write, one_line

from .prediction import Prediction

RESULT_CLASSES = 5  # in each line of result.txt
UNKNOWN = "(unknown)"


def best(prediction: Prediction, names: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Return the `count` best classes: [{"class", "index", "probability"}], best first; equal ones in their order."""
    values, indices = prediction.probabilities.sort(descending=True, stable=True)
    return [
        {"class": names[index], "index": index, "probability": value}
        for value, index in zip(values[:count].tolist(), indices[:count].tolist(), strict=True)
    ]


def print_table(predictions: Sequence[Prediction], names: Sequence[str], count: int) -> None:
    """Print a row per image: its name and the `count` best classes with their probabilities in percent."""
    rows = [
        [
            one_line(p.name),
            *([UNKNOWN] if p.unknown else []),
            *(
                f"{one_line(guess['class'])} {100 * guess['probability']:.1f} %"
                for guess in best(p, names, count - bool(p.unknown))
            ),
        ]
        for p in predictions
    ]
    print(tabulate(rows, headers=["image", *map(str, range(1, min(count, len(names)) + 1))], disable_numparse=True))


def print_csv(predictions: Sequence[Prediction], names: Sequence[str], count: int) -> None:
    """Print a row per image: its path, the `count` best classes with their probabilities, and whether it is unknown."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    ranks = range(1, min(count, len(names)) + 1)
    asked = any(p.unknown is not None for p in predictions)
    unknown = ["unknown"] if asked else []
    writer.writerow(["path", *(f"{column}_{rank}" for rank in ranks for column in ("class", "probability")), *unknown])
    for p in predictions:
        guesses = best(p, names, count)
        cells = [guess[key] for guess in guesses for key in ("class", "probability")]
        writer.writerow([p.path, *cells, *([int(bool(p.unknown))] if asked else [])])


def print_json(
    predictions: Sequence[Prediction], names: Sequence[str], count: int, unreadable: Mapping[str, str], head: str
) -> None:
    """Print one object: the head, the classes, the predictions of each image, and why others could not be read."""
    content = {
        "head": head,
        "classes": list(names),
        "images": [
            {
                "path": p.path,
                "predictions": best(p, names, count),
                **({} if p.unknown is None else {"unknown": p.unknown}),
            }
            for p in predictions
        ],
        "unreadable": [{"path": path, "reason": reason} for path, reason in unreadable.items()],
    }
    print(json.dumps(content, indent=2))


def write_result(args: argparse.Namespace, predictions: Sequence[Prediction], names: Sequence[str]) -> None:
    """Write `result.txt`: "name index index index index index" per image; fewer where there are fewer classes.

    Beside a saved classifier, which has no folder of its own, nothing is written unless --output says where.
    """
    if args.output is None and not Path(args.model_dir).is_dir():
        return
    path = Path(args.output or Path(args.model_dir) / "predictions") / "result.txt"
    try:
        with atomic_write(path) as stream:
            for p in predictions:
                stream.write(
                    " ".join([one_line(p.name), *(str(g["index"]) for g in best(p, names, RESULT_CLASSES))]) + "\n"
                )
    except OSError as error:
        message = f"Expected to write {path} but got: {error.strerror or error}. Choose another folder with --output"
        if args.output is not None:
            raise InputError(message) from error
        print(f"warning: {message}", file=sys.stderr)
    else:
        print(f"The five best classes of each image, by number: {path}", file=sys.stderr)

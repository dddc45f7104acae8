"""Measure method after method, the published computation beside ours, and write results file and table.

Of several methods, each has a process of its own, whose memory is free again when it ends.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine, write_json
from benchmarks.report import write_section

Row = dict[str, Any]
HIDDEN = ("only", "opts")  # arguments that are no settings


def add_arguments(parser: argparse.ArgumentParser, methods: Collection[str]) -> None:
    """Adds the arguments that `measure_rows` reads."""
    parser.add_argument("--methods", default=",".join(methods), help="comma-separated")
    parser.add_argument("--output", type=Path, help="results file to write; rows of other methods in it stay")
    parser.add_argument("--document", type=Path, help="document whose table is written anew, docs/PERFORMANCE.md")
    parser.add_argument("--only", choices=methods, help=argparse.SUPPRESS)  # measure this one here, and print its row


def chosen_methods(parser: argparse.ArgumentParser, text: str, methods: Collection[str]) -> list[str]:
    """Returns the methods that --methods names; ends the program where one is not known."""
    asked = text.split(",")
    unknown = [name for name in asked if name not in methods]
    if unknown:
        parser.error(f"Expected --methods to be of {', '.join(methods)} but got {', '.join(unknown)}")
    return asked


def measure_apart(name: str, arguments: Sequence[str], script: str) -> Row | None:
    """Measures a method in a process of its own.

    Args:
        name: of the row.
        arguments: the command's own.
        script: the command.

    Returns:
        The row, or None where the process failed; what it said of that is on stderr.
    """
    command = [sys.executable, script, *arguments, "--only", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{name}: no result; its process ended with {done.returncode}", file=sys.stderr, flush=True)
        return None
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def measure_rows(
    args: argparse.Namespace,
    arguments: Sequence[str],
    *,
    benchmark: str,
    script: str,
    order: Collection[str],
    measure: Callable[[str], Row],
    markdown: Callable[[Row], str],
    marks: tuple[str, str],
) -> int:
    """Measures the methods of --methods, or of --only, and writes the results file after each.

    Args:
        args: the command line, read; its threads are set already.
        arguments: the command line.
        benchmark: name of the benchmark, for the file.
        script: the command.
        order: of the rows in the table.
        measure: measures a method in this process and returns its row, which has a "method".
        markdown: makes the table of the results.
        marks: lines of the document that the table stands between.

    Returns:
        0, or 1 if a method failed.
    """
    if args.only:
        print(json.dumps(measure(args.only)))
        return 0
    settings = {name: value for name, value in vars(args).items() if name not in HIDDEN}
    result: Row = {
        "benchmark": benchmark,
        "rows": [],
        "settings": {**settings, "output": str(args.output), "document": str(args.document)},
        "machine": machine(torch.device("cpu")),
    }
    known: dict[str, Row] = {}
    if args.output and args.output.is_file():
        known = {row["method"]: row for row in json.loads(args.output.read_text(encoding="utf-8"))["rows"]}
    failed = False
    for name in args.methods:
        row = measure_apart(name, arguments, script) if len(args.methods) > 1 else measure(name)
        if row is None:
            failed = True
            continue
        known[name] = row
        result["rows"] = [known[method] for method in order if method in known]
        write_json(args.output, result)
        table = [line for line in markdown({**result, "rows": [row]}).splitlines() if line.startswith("|")]
        print(table[-1], flush=True)
    if result["rows"]:
        print(markdown(result))
    if not failed:
        write_section(args.document, markdown(result), *marks)
    return int(failed)

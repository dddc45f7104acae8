"""Writes the tables of docs/PERFORMANCE.md from the results files that benchmarks/run_all.sh left.

    python benchmarks/report.py output/benchmarks

Everything between the two marker lines is written anew; the rest of the document stays.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_end_to_end, bench_eval, bench_memory, bench_step
from benchmarks.tables import gigabytes, table
from dassl.utils.cli import fail, run_main

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- benchmarks: begin (written by benchmarks/report.py) -->"
END = "<!-- benchmarks: end -->"
_MODULES: dict[str, Any] = {
    "step": bench_step,
    "eval": bench_eval,
    "memory": bench_memory,
    "end_to_end": bench_end_to_end,
}


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results files of a folder: steps first, then evaluations, memory and whole runs; by device and size.

    Raises:
        ValueError: there is none.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("benchmark") in _MODULES:
            results.append(result)
    if not results:
        raise ValueError(f"Expected results files in {folder} but found none")
    kinds = list(_MODULES)

    def order(result: dict[str, Any]) -> tuple[Any, ...]:
        s = result["settings"]
        size = s.get("classes", 0)
        size = max(size) if isinstance(size, list) else size
        return kinds.index(result["benchmark"]), s.get("device", "cpu") != "cpu", size, s.get("batch", 0)

    return sorted(results, key=order)


def title(result: dict[str, Any]) -> str:
    """Heading of a result's section."""
    s = result["settings"]
    if result["benchmark"] == "end_to_end":
        return f"Whole runs: tiny CLIP, Digits, {s['epochs']} epochs"
    if result["benchmark"] == "memory":
        return f"Memory of a training step: {s['model']}, {s['precision']}, batch {s['batch']}"
    what = "Training step" if result["benchmark"] == "step" else f"Evaluation of {s['images']} images"
    return f"{what}: {s['model']}, {s['classes']} classes, {s['precision']}, batch {s['batch']}, {s['device']}"


def overview(results: list[dict[str, Any]]) -> str:
    """One line per measured ratio."""
    rows = []
    for r in results:
        s = r["settings"]
        where = f"{s.get('device', 'cpu')} {s.get('precision', '')}, {s.get('classes')} classes, batch {s.get('batch')}"
        if r["benchmark"] == "step":
            for kind, name in (("fresh", "training step"), ("views", "training step, kept views")):
                rows.append(
                    [
                        name,
                        where,
                        f"{r['ratio_' + kind]:.2f}",
                        f"{r['flop_ratio_' + kind]:.2f}",
                        f"{r['floor_ratios'][kind]:.2f}",
                    ]
                )
        elif r["benchmark"] == "eval":
            for kind, name in bench_eval.NAMES.items():
                if kind != "naive":
                    ratio = r["ratio" if kind == "ours" else f"ratio_{kind}"]
                    rows.append(
                        [
                            f"evaluation, {name.removeprefix('... ')}",
                            where,
                            f"{ratio:.2f}",
                            f"{r['flop_ratio'][kind]:.2f}",
                            f"{r['floor_ratios'][kind]:.2f}",
                        ]
                    )
    memory = [
        f"At {r['settings']['classes']} classes, batch {r['settings']['batch']}, autograd keeps "
        f"{gigabytes(r['memory']['naive']['activations'])} as published and "
        f"{gigabytes(r['memory']['fresh']['activations'])} in the accelerated step: {r['peak_memory_ratio']:.1f} times "
        "less, constants of the class list counted in."
        for r in results
        if r["benchmark"] == "step" and r["settings"]["device"] == "cpu"
    ]
    head = ["what", "where", "times faster", "times fewer FLOPs", "time / floor"]
    return "\n".join([table(head, rows), "", *memory])


def section(results: list[dict[str, Any]]) -> str:
    """The whole marked section."""
    parts = [BEGIN, "", "### Overview", "", overview(results), ""]
    for result in results:
        parts += [f"### {title(result)}", "", _MODULES[result["benchmark"]].markdown(result), ""]
    return "\n".join([*parts, END])


def replace_section(document: str, new: str, begin: str = BEGIN, end: str = END) -> str:
    """The document with the section between two marker lines replaced.

    Raises:
        ValueError: it has no such section.
    """
    before, found, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"Expected the document to have the lines {begin!r} and {end!r} but got one without")
    return before + new + after


def write_section(document: Path | None, text: str, begin: str, end: str) -> None:
    """Write a text between two marker lines of a document; None: write nothing.

    Raises:
        ValueError: it has no such lines.
    """
    if document is not None:
        new = replace_section(document.read_text(encoding="utf-8"), f"{begin}\n\n{text}\n\n{end}", begin, end)
        document.write_text(new, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "output" / "benchmarks")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "PERFORMANCE.md")
    args = parser.parse_args(arguments)
    try:
        new = section(read_results(args.folder))
        text = replace_section(args.document.read_text(encoding="utf-8"), new)
    except (OSError, ValueError) as error:
        return fail(error)
    args.document.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

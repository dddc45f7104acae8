"""Writes the GPU's tables of docs/PERFORMANCE.md from the file that benchmarks/gpu_day.py left.

    python benchmarks/gpu_report.py output/gpu_day/gpu_day.json

Everything between the two marker lines is written anew; the rest of the document stays.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import ROOT, replace_section
from benchmarks.tables import gigabytes, made_by, seconds, table
from dassl.utils.cli import fail, run_main

BEGIN = "<!-- gpu day: begin (written by benchmarks/gpu_report.py) -->"
END = "<!-- gpu day: end -->"
WAYS = {
    "published": "as published",
    "fresh": "fresh augmentation",
    "from host": "fresh, images copied from the host",
    "views": "kept views",
}
Rows = list[dict[str, Any]]


def _share(row: dict[str, Any], key: str = "share of bf16") -> str:
    return f"{100 * row[key]:.0f} %" if key in row else ""


def _facts(rows: Rows) -> str:
    cells = [[f"{r['kind']} products", f"{r['tflops']:.0f} TFLOP/s"] for r in rows if r["what"] == "matrix rate"]
    names = {"device": "copy on the device, read and written", "pinned": "copy from pinned host memory"}
    names["pageable"] = "copy from pageable host memory"
    copies = next((r for r in rows if r["what"] == "copy rate"), {})
    cells += [[title, f"{copies[name]:.0f} GB/s"] for name, title in names.items() if name in copies]
    return table(["measured", "rate"], cells)


def _steps(rows: Rows) -> str:
    cells = []
    for r in rows:
        where = [f"{r['mode']}, {r['classes']} classes, batch {r['batch']}"]
        if "failed" in r:
            cells.append([*where, "did not fit", "", "", "", "", ""])
            continue
        cells.append(
            [
                *where,
                WAYS[r["way"]],
                seconds(r["seconds"]),
                f"{r['ratio']:.2f}",
                _share(r),
                gigabytes(r["peak"] - r["before"]),
                f"{r['loss difference']:.1e}",
            ]
        )
    head = ["where", "step", "time", "times faster", "of the bf16 rate", "memory of the step", "loss differs by"]
    return table(head, cells)


def _compiled(rows: Rows) -> str:
    cells = [
        [
            WAYS[r["way"]],
            f"compiled, {r['compiled']}" if r["compiled"] else "eager",
            seconds(r["seconds"]),
            _share(r),
            seconds(r["first"]),
            f"{r['loss difference']:.1e}",
        ]
        for r in rows
    ]
    return table(["step", "", "time", "of the bf16 rate", "first step", "loss differs by"], cells)


def _methods(rows: Rows) -> str:
    cells = []
    for r in rows:
        where = f"{r['trainer']}, {r['mode']}, {r['classes']} classes, batch {r['batch']}"
        numbers = ["did not fit", "", ""] if "failed" in r else [seconds(r["seconds"]), _share(r), gigabytes(r["peak"])]
        cells.append([where, *numbers])
    return table(["step", "time", "of the bf16 rate", "peak memory"], cells)


def _syncs(rows: Rows) -> str:
    cells = [[f"{r['trainer']}, {r['mode']}, {r['way']}", f"{r['waits']:g}"] for r in rows]
    return table(["step", "waits for the device"], cells)


def _profile(rows: Rows) -> str:
    lines = []
    for r in rows:
        kinds = ", ".join(f"{kind} {ms:.2f} ms" for kind, ms in list(r["milliseconds by kind"].items())[:8])
        lines.append(
            f"* {WAYS[r['way']]}, {r['mode']}, {r['classes']} classes, batch {r['batch']}: {seconds(r['wall'])} a step "
            f"under the profiler, idle for {100 * r['idle share']:.0f} %, {r['kernels']:.0f} kernels: {kinds}."
        )
    return "\n".join(lines)


def _agreement(rows: Rows) -> str:
    cells = [
        [
            f"{r['trainer']}, {r['model']}, batch {r['batch']}",
            str(len(r["cpu"])),
            f"{r['cpu'][-1]:.4f}",
            f"{r['difference']:.1e}",
        ]
        for r in rows
    ]
    return table(["trainer", "steps", "last loss on the CPU", "largest difference"], cells)


def _evaluation(rows: Rows) -> str:
    cells = []
    for r in rows:
        for way, title in (("naive", "as published"), ("ours", "accelerated"), ("features", "zero-shot features kept")):
            speed = r["images_per_second"]
            ratio = speed[way] / speed["naive"]
            cells.append([f"{r['mode']}, {r['classes']} classes", title, f"{speed[way]:,.0f}", f"{ratio:.2f}"])
    return table(["where", "pass", "images / s", "times faster"], cells)


def _loading(rows: Rows) -> str:
    names = {"loader": "the loader alone", "training": "training through the loader", "step": "the step alone"}
    cells = [[names[r["part"]], f"{r['images_per_second']:,.0f}", _share(r, "waiting")] for r in rows]
    about = f"JPEG files of {rows[0]['files']} pixels, {rows[0]['workers']} workers, batch {rows[0]['batch']}."
    return "\n\n".join([about, table(["what", "images / s", "waiting for images"], cells)])


def _tests(rows: Rows) -> str:
    return "\n".join(f"`pytest -m cuda tests/cuda`: {r['summary'].strip('= ')}." for r in rows)


_PARTS: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "facts": ("Rates", _facts),
    "steps": ("Training step of DLR-CLIP", _steps),
    "compile": ("Training step of DLR-CLIP through torch.compile", _compiled),
    "profile": ("Where the time of a step goes", _profile),
    "syncs": ("How often a step waits for the device", _syncs),
    "methods": ("Training steps of other methods", _methods),
    "evaluation": ("Evaluation of DLR-CLIP", _evaluation),
    "loading": ("Training from image files", _loading),
    "agreement": ("Losses on the CPU and on the GPU, fp32 without TF32", _agreement),
    "tests": ("Tests on the GPU", _tests),
}


def section(result: dict[str, Any]) -> str:
    """The whole marked section; a part without rows is left out, one that did not end says so."""
    parts = [BEGIN, "", made_by(result), ""]
    for name, (title, tell) in _PARTS.items():
        part = result["parts"].get(name, {})
        if not part.get("rows"):
            continue
        parts += [f"### {title}", "", tell(part["rows"]), ""]
        if part["status"] != "done":
            parts += [f"This part ended early: {part['status']}.", ""]
    return "\n".join([*parts, END])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?", default=ROOT / "output" / "gpu_day" / "gpu_day.json")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "PERFORMANCE.md")
    args = parser.parse_args(arguments)
    try:
        result = json.loads(args.file.read_text(encoding="utf-8"))
        text = replace_section(args.document.read_text(encoding="utf-8"), section(result), BEGIN, END)
    except (OSError, ValueError) as error:
        return fail(error)
    args.document.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

"""Tables and figures of finished runs in one HTML page that needs nothing beside itself.

    python scripts/report.py output/digits ["Ours=other/folder" ...] [--csv published.csv] [--output report.html]

The page has a table of every head's mean accuracy over seeds, accuracy by shots, and, for each of the first `--runs`
runs, its facts, its table of heads, what was chosen on what, and its figures. What a run did not leave is said in the
place where it would stand, and folders of runs that have not finished are named.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.evaluation.predictions import Predictions
from dassl.utils import atomic_write
from dassl.utils.cli import fail, run_main
from scripts.figures.command import open_predictions
from scripts.figures.plot_confusion import confusion_figure
from scripts.figures.plot_curves import run_curves
from scripts.figures.plot_features import features_figure
from scripts.figures.plot_gates import gates_figure
from scripts.figures.plot_logits import logits_figure
from scripts.figures.plot_shots import shots_figure
from scripts.figures.style import readable, write_figure
from scripts.lib.runs import Run, find_runs, read_records, run_records
from scripts.lib.tables import BANDS, OF_TWO, mean_and_band

# The figures of a run's predictions: what each shows -> the function that draws it.
FIGURES: dict[str, Callable[[Predictions], Figure]] = {
    "Confusion among the most confused classes, before and after": confusion_figure,
    "Logit of the true class and of its strongest rival": logits_figure,
    "What the method decides for each image": gates_figure,
    "t-SNE of image features": features_figure,
}
CSS = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 0.6rem 0 1.2rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.8rem 0.2rem 0; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
th { border-bottom: 1.5px solid #444; }
.main { font-weight: 600; }
.scroll { overflow-x: auto; }
figure { margin: 1rem 0 1.6rem; }
figure img { max-width: 100%; height: auto; }
figcaption, .missing { color: #555; }
summary { cursor: pointer; font-size: 1.1rem; font-weight: 600; margin: 0.8rem 0; overflow-wrap: anywhere; }
code { overflow-wrap: anywhere; }
"""


def text(value: object) -> str:
    """Return any value as HTML that shows its text."""
    return html.escape(readable(str(value)))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], marked: int | None = None) -> str:
    """Return an HTML table of any texts; the row `marked` is emphasized."""
    lines = ["<div class='scroll'><table><thead><tr>", *(f"<th>{text(cell)}</th>" for cell in head)]
    lines.append("</tr></thead><tbody>")
    for number, row in enumerate(rows):
        lines.append("<tr class='main'>" if number == marked else "<tr>")
        lines += [f"<td>{text(cell)}</td>" for cell in row]
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table></div>\n"])


def picture(figure: Figure, caption: str) -> str:
    """Return a figure as HTML, its image inside the page."""
    stream = io.BytesIO()
    write_figure(figure, stream, "svg")
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    width = round(figure.get_figwidth() * 110)  # points of the screen: a little larger than on paper
    return (
        f"<figure><img src='data:image/svg+xml;base64,{data}' width='{width}' alt='{text(caption)}'>"
        f"<figcaption>{text(caption)}</figcaption></figure>\n"
    )


def attempt(draw: Callable[[], Figure], caption: str) -> str:
    """Return the picture, or a line that says why there is none."""
    try:
        return picture(draw(), caption)
    except ValueError as error:
        return f"<p class='missing'>{text(caption)}: not shown. {text(error)}</p>\n"


def heads_rows(runs: Iterable[Run]) -> tuple[list[str], list[list[str]]]:
    """Return (head names, rows of dataset, method, shots, number of runs, and each head's accuracy)."""
    groups: dict[tuple[str, str, int], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.dataset(), run.method, run.shots].append(run)
    heads = list(dict.fromkeys(head for run in runs for head in run.heads()))
    rows = []
    for (dataset, method, shots), members in sorted(groups.items()):
        cells = []
        for head in heads:
            values = [run.heads()[head]["accuracy"] for run in members if head in run.heads()]
            cells.append(_mean(values) if values else "")
        rows.append([dataset, method, "all" if shots < 0 else str(shots), str(len(members)), *cells])
    return heads, rows


def _mean(values: Sequence[float]) -> str:
    mean, half = mean_and_band(values)
    return f"{mean:.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:.1f}"


def run_section(run: Run) -> str:
    """Return the section of one run: its facts, heads and figures."""
    metrics = run.metrics
    main = metrics.get(metrics.get("split", "test"), {}).get("main")
    names = ("accuracy", "top5", "macro_f1", "ece")
    rows = [
        [head, *(f"{values[name]:.2f}" if name in values else "" for name in names)]
        for head, values in run.heads().items()
    ]
    marked = next((i for i, row in enumerate(rows) if row[0] == main), None)
    parts = [
        f"<details open><summary>{text(run.method)} on {text(run.dataset())}: {text(run.folder)}</summary>\n",
        table(["fact", "value"], _facts(metrics)),
        table(["head", "accuracy %", "top-5 %", "macro F1 %", "ECE %"], rows, marked),
        attempt(partial(run_curves, run.folder), "Training curves"),
    ]
    try:
        predictions = open_predictions(run.folder)
        parts += [attempt(partial(draw, predictions), caption) for caption, draw in FIGURES.items()]
    except ValueError as error:
        parts.append(f"<p class='missing'>Figures of predictions: not shown. {text(error)}</p>\n")
    return "".join([*parts, "</details>\n"])


def _facts(metrics: Mapping[str, Any]) -> list[tuple[str, object]]:
    facts = [
        (name, metrics[name]) for name in ("backbone", "shots", "seed", "epochs", "split", "mode") if name in metrics
    ]
    if metrics.get("split_digest"):
        facts.append(("split digest", metrics["split_digest"]))
    facts += [(f"{name} parameters", f"{count:,}") for name, count in metrics.get("params", {}).items()]
    for name, choice in metrics.get("selected", {}).items():
        facts.append((f"selected {name}", f"{choice.get('value')} (on {choice.get('on')}, {choice.get('n')} images)"))
    return facts


def page(runs: Sequence[Run], unfinished: Sequence[Path], published: Sequence[Mapping[str, Any]], most: int) -> str:
    """Return the HTML page.

    Args:
        runs: the finished runs.
        unfinished: folders of runs that have not finished.
        published: records of other methods, for the figure of accuracy by shots.
        most: how many runs get a section of their own.
    """
    if not runs:
        raise ValueError("Expected finished runs below the folders but found none")
    heads, rows = heads_rows(runs)
    parts = [
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>Report of runs</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<link rel='icon' href='data:,'><style>{CSS}</style></head><body>\n<h1>Report of {len(runs)} runs</h1>\n",
        "<h2>Accuracy of every head</h2>\n",
        table(["dataset", "method", "shots", "runs", *heads], rows),
        f"<p>Percent. Mean ± half of the {BANDS['t95']}{OF_TWO}, where there are several runs.</p>\n",
        "<h2>Accuracy by shots</h2>\n",
        attempt(lambda: shots_figure([*run_records(runs), *published]), "Accuracy by training images per class"),
        "<h2>Runs</h2>\n",
        *(run_section(run) for run in runs[:most]),
    ]
    if len(runs) > most:
        parts.append(f"<p>{len(runs) - most} more runs have no section of their own (--runs).</p>\n")
    if unfinished:
        names = "".join(f"<li><code>{text(folder)}</code></li>" for folder in unfinished)
        parts.append(f"<h2>Left out: not finished</h2>\n<ul>{names}</ul>\n")
    return "".join([*parts, "</body></html>\n"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders that hold run folders, or NAME=FOLDER")
    parser.add_argument("--csv", nargs="+", type=Path, default=[], help="files of published numbers")
    parser.add_argument("--runs", type=int, default=8, help="how many runs get a section of their own (default: 8)")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="file to write (default: report.html)")
    args = parser.parse_args(argv)
    try:
        runs, unfinished = find_runs(args.folders)
        published = [record for path in args.csv for record in read_records(path)]
        content = page(runs, unfinished, published, max(args.runs, 0))
        with atomic_write(args.output) as stream:
            stream.write(content)
    except (ValueError, OSError) as error:
        return fail(error)
    for folder in unfinished:
        print(f"left out, not finished: {folder}", file=sys.stderr)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

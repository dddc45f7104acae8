"""Tables and figures of finished runs in one HTML page that needs nothing beside itself.

    python scripts/report.py output/digits ["Ours=other/folder" ...] [--csv published.csv] [--output report.html]

The page has a table of every head's mean accuracy over seeds, accuracy by shots, and, for each of the first `--runs`
runs, its facts, its table of heads, what was chosen on what, its worst classes, its surest mistakes with pictures
(where the images are still there), and its figures. What a run did not leave is said in the place where it would stand,
and folders of runs that have not finished are named.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import html
import io
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.engine.environment import project_version
from dassl.evaluation.drawing import Picture
from dassl.evaluation.mistakes import SHOWN, ClassResult, class_results, mistakes_of, mistakes_sheet
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
from scripts.lib.published import PAIR_COLUMNS, ours_in, pair_rows, pairs, read_published
from scripts.lib.runs import Run, each_once, find_runs, read_records, run_records
from scripts.lib.tables import BANDS, OF_TWO, mean_and_band

# The figures of a run's predictions: what each shows -> the function that draws it.
FIGURES: dict[str, Callable[[Predictions], Figure]] = {
    "Confusion among the most confused classes, before and after": confusion_figure,
    "Logit of the true class and of its strongest rival": logits_figure,
    "What the method decides for each image": gates_figure,
    "t-SNE of image features": features_figure,
}
WORST = 10  # classes that a run's section names
CSS = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 0.6rem 0 1.2rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.8rem 0.2rem 0; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; min-width: 6rem; }
.facts td { text-align: left; overflow-wrap: anywhere; }
@media (max-width: 30rem) { body { margin: 1rem auto; } th, td { padding-right: 0.5rem; font-size: 13px; } }
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
    width = round(figure.get_figwidth() * 110)  # points of the screen: a little larger than on paper
    return _image(stream.getvalue(), "svg+xml", width, caption)


def _image(content: bytes, kind: str, width: int, caption: str) -> str:
    data = base64.b64encode(content).decode("ascii")
    return (
        f"<figure><img src='data:image/{kind};base64,{data}' width='{width}' alt='{text(caption)}'>"
        f"<figcaption>{text(caption)}</figcaption></figure>\n"
    )


def attempt(draw: Callable[[], Figure], caption: str) -> str:
    """Return the picture, or a line that says why there is none."""
    try:
        return picture(draw(), caption)
    except ValueError as error:
        return f"<p class='missing'>{text(caption)}: not shown. {text(error)}</p>\n"


def heads_rows(runs: Iterable[Run]) -> list[list[str]]:
    """Return rows of dataset, method, shots, head, accuracy, and number of runs; a row for each head that there is."""
    groups: dict[tuple[str, str, int], dict[str, list[float]]] = defaultdict(dict)
    for run in each_once(runs):
        for head, values in run.heads().items():
            groups[run.dataset(), run.method, run.shots].setdefault(head, []).append(values["accuracy"])
    return [
        [dataset, method, "all" if shots < 0 else str(shots), head, _mean(values), str(len(values))]
        for (dataset, method, shots), heads in sorted(groups.items())
        for head, values in heads.items()
    ]


def _mean(values: Sequence[float]) -> str:
    mean, half = mean_and_band(values)
    return f"{mean:.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:.1f}"


def mistakes_part(predictions: Predictions) -> str:
    """Return the worst classes, and the surest mistakes as pictures where any of the images is still there."""
    results = class_results(predictions)
    rows = [(r.name, r.total, f"{100 * r.correct / r.total:.1f}", _taken_for(r)) for r in results[:WORST]]
    title = f"The {WORST} worst of {len(results)} classes" if len(results) > WORST else "Classes, the worst first"
    parts = [f"<h3>{title}</h3>\n", table(["class", "images", "accuracy %", "most often taken for"], rows)]
    mistakes = mistakes_of(predictions)
    caption = f"The surest of {len(mistakes)} mistakes, with the probabilities of the wrong and of the true class"
    if any(Path(mistake.path).is_file() for mistake in mistakes[:SHOWN] if mistake.path):
        sheet = Picture(mistakes_sheet(mistakes))
        parts.append(_image(sheet.png, "png", sheet.pixels.shape[1], caption))
    elif mistakes:
        parts.append(f"<p class='missing'>{caption}: not shown. The images are not where the run found them.</p>\n")
    return "".join(parts)


def _taken_for(result: ClassResult) -> str:
    return f"{result.rival} ({result.to_rival})" if result.rival else ""


def run_section(run: Run, shown: bool) -> str:
    """Return the section of one run: its facts, heads and figures.

    Args:
        run: a finished run.
        shown: whether the section is open when the page is.
    """
    metrics = run.metrics
    main = metrics.get(metrics.get("split", "test"), {}).get("main")
    names = ("accuracy", "top5", "macro_f1", "ece")
    rows = [
        [head, *(f"{values[name]:.2f}" if name in values else "" for name in names)]
        for head, values in run.heads().items()
    ]
    marked = next((i for i, row in enumerate(rows) if row[0] == main), None)
    parts = [
        f"<details{' open' if shown else ''}><summary>{text(run.method)} on {text(run.dataset())}: {text(run.folder)}"
        "</summary>\n",
        f"<div class='facts'>{table(['fact', ''], _facts(run))}</div>",
        table(["head", "accuracy %", "top-5 %", "macro F1 %", "ECE %"], rows, marked),
    ]
    curves = attempt(partial(run_curves, run.folder), "Training curves")
    try:
        predictions = open_predictions(run.folder)
        parts += [mistakes_part(predictions), curves]
        parts += [attempt(partial(draw, predictions), caption) for caption, draw in FIGURES.items()]
    except ValueError as error:
        parts += [curves, f"<p class='missing'>Figures of predictions: not shown. {text(error)}</p>\n"]
    return "".join([*parts, "</details>\n"])


def _facts(run: Run) -> list[tuple[str, object]]:
    metrics, told = run.metrics, run.environment()
    facts: list[tuple[str, object]] = [(name, told[name]) for name in ("started", "device") if name in told]
    if isinstance(told.get("command"), list):
        facts.append(("command", shlex.join(map(str, told["command"]))))
    facts += [
        (name, metrics[name]) for name in ("backbone", "shots", "seed", "epochs", "split", "mode") if name in metrics
    ]
    if metrics.get("split_digest"):
        facts.append(("digest of the split (runs with the same one have the same images)", metrics["split_digest"]))
    facts += [(f"{name} parameters", f"{count:,}") for name, count in metrics.get("params", {}).items()]
    for name, choice in metrics.get("selected", {}).items():
        facts.append((f"selected {name}", f"{choice.get('value')} (on {choice.get('on')}, {choice.get('n')} images)"))
    return facts


def _beside(runs: Sequence[Run]) -> list[str]:
    """Return a table of our numbers beside published ones; [] where there are none of the same."""
    rows = pair_rows(pairs(ours_in(runs), read_published()))
    return ["<h2>Beside published numbers</h2>\n", table(PAIR_COLUMNS, rows)] if rows else []


def page(
    runs: Sequence[Run], unfinished: Sequence[Path], published: Sequence[Mapping[str, Any]], most: int, made: str = ""
) -> str:
    """Return the HTML page.

    Args:
        runs: the finished runs.
        unfinished: folders of runs that have not finished.
        published: records of other methods, for the figure of accuracy by shots.
        most: how many runs get a section of their own.
        made: when, by what command and version the page was made.
    """
    if not runs:
        raise ValueError("Expected finished runs below the folders but found none")
    title = f"Report of {len(runs)} runs" if len(runs) > 1 else "Report of a run"
    parts = [
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>Report of runs</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<link rel='icon' href='data:,'><style>{CSS}</style></head><body>\n<h1>{title}</h1>\n",
        f"<p class='missing'>{text(made)}</p>\n" if made else "",
        "<h2>Accuracy of every head</h2>\n",
        table(["dataset", "method", "shots", "head", "accuracy %", "runs"], heads_rows(runs)),
        "<p>Shots: training images per class; 0 for zero-shot CLIP. A head is one of the classifiers that a method "
        f"makes. Mean ± half of the {BANDS['t95']}{OF_TWO}, where there are several runs.</p>\n",
        *_beside(runs),
        "<h2>Accuracy by shots</h2>\n",
        attempt(lambda: shots_figure([*run_records(runs), *published]), "Accuracy by training images per class"),
        "<h2>Runs</h2>\n",
        "<p>Click a run to open it. The row in bold is the head that counts as the method's result. Top-5: the true "
        "class is among the five likeliest. Macro F1: the mean over classes of the harmonic mean of precision and "
        "recall. ECE: by how much confidence and accuracy differ on average.</p>\n",
        *(run_section(run, shown=number == 0) for number, run in enumerate(runs[:most])),
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
        command = shlex.join(["python", "scripts/report.py", *(sys.argv[1:] if argv is None else argv)])
        made = f"Made {datetime.datetime.now():%Y-%m-%d %H:%M} by {project_version()}: {command}"
        content = page(runs, unfinished, published, max(args.runs, 0), made)
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

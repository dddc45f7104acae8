"""Draw the two pictures of README.md into docs/images: the method, and accuracy by shots from docs/RESULTS.md.

python scripts/dev/docs_figures.py
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
SHOTS = (1, 2, 4, 8, 16)
LEAD = "DLRCLIP:tiny_plus"
DRAWN = (LEAD, "TIMO", "GDA", "DAC", "TransCLIP", "LPPlusPlus", "APE", "ZeroshotCLIP")
ORANGE, GRAY = "#d9822b", "#777777"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure.

    Args:
        width, height: in inches.
    """
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def read_results(text: str) -> dict[str, dict[str, list[float]]]:
    """Return dataset -> method -> mean accuracy (percent) at each number of shots.

    Args:
        text: docs/RESULTS.md, whose first tables have a method per row and a number of shots per column. Later tables
            of the same dataset do not count.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for title, table in re.findall(r"^#+ (Digits|Shapes)\b[^\n]*\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE):
        rows = re.findall(r"^\| (\S+) +\|(.*)\|$", table, re.MULTILINE)
        means = {name: re.findall(r"(?:^|\|)[ *]*(\d+\.\d)", cells) for name, cells in rows}
        known = {name: [float(value) for value in values] for name, values in means.items()}
        if title not in found:
            found[title] = {name: values for name, values in known.items() if len(values) == len(SHOTS)}
    return found


def draw_accuracy(results: dict[str, dict[str, list[float]]]) -> Figure:
    """Draw a panel per dataset: mean accuracy by shots."""
    figure = new_figure(9, 3.2)
    panels = figure.subplots(1, len(results), sharey=True)
    for axes, (dataset, methods) in zip(panels, results.items(), strict=True):
        for name in DRAWN:
            first = name == LEAD
            style: dict[str, Any] = {"color": "black", "linewidth": 2.4, "zorder": 3} if first else {"linewidth": 1.2}
            axes.plot(SHOTS, methods[name], marker="o", markersize=3, label=name.partition(":")[0], **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(SHOTS, [str(shots) for shots in SHOTS])
        axes.set(title=dataset, xlabel="labeled images per class")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(*panels[-1].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    return figure


def draw_method() -> Figure:
    """Draw DLR-CLIP: which parts are frozen, which are learnt, how logits become heads, and the third level below."""
    figure = new_figure(8, 4.3)
    axes = figure.subplots()
    axes.set(xlim=(0, 100), ylim=(-16, 40))
    axes.axis("off")

    def box(x: float, y: float, width: float, height: float, words: str, color: str) -> None:
        """Draw a box with words in its middle."""
        shape: dict[str, Any] = {"boxstyle": "round,pad=0.3,rounding_size=1", "facecolor": "white", "linewidth": 1.4}
        axes.add_patch(FancyBboxPatch((x, y), width, height, edgecolor=color, **shape))
        axes.text(x + width / 2, y + height / 2, words, ha="center", va="center", fontsize=7.5)

    def arrow(start: tuple[float, float], end: tuple[float, float], words: str = "") -> None:
        """Draw an arrow, with words above its middle."""
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#333333", "linewidth": 1})
        if words:
            axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 1, words, ha="center", fontsize=7)

    box(1, 27, 11, 7, "image", GRAY)
    box(1, 6, 11, 7, "class names", GRAY)
    box(17, 26, 17, 9, "image encoder\n(frozen CLIP)", GRAY)
    box(17, 5, 17, 9, "text encoder\n(frozen CLIP)", GRAY)
    box(17, 16.5, 17, 7, "CMA: adapters\nshared by both", ORANGE)
    box(42, 26, 14, 9, "clip logits\n(zero-shot)", GRAY)
    box(42, 5, 14, 9, "cma logits", ORANGE)
    box(62, 15, 15, 10, "GLR: gated\nrefiner", ORANGE)
    box(83, 15, 15, 10, "fusion gate\n→ final logits", ORANGE)
    arrow((12.6, 30.5), (16.4, 30.5))
    arrow((12.6, 9.5), (16.4, 9.5))
    arrow((25.5, 24), (25.5, 25.4))
    arrow((25.5, 16), (25.5, 14.6))
    arrow((34.6, 30.5), (41.4, 30.5))
    arrow((34.6, 27.5), (41.6, 13))
    arrow((34.6, 12.5), (41.6, 27))
    arrow((34.6, 9.5), (41.4, 9.5))
    arrow((56.6, 29), (61.6, 24))
    arrow((56.6, 11), (61.6, 16))
    arrow((77.6, 20), (82.4, 20), "glr")
    arrow((56.6, 8), (86, 14.4))
    arrow((56.6, 33), (90.5, 26))
    axes.text(76, 32.5, "SKD: smoothed distillation", ha="center", fontsize=7)
    axes.text(99, 38, "gray: frozen   orange: learnt", ha="right", fontsize=7, color="#444444")
    # The third level, fitted after training.
    axes.plot((0, 100), (0, 0), color="#999999", linewidth=0.8, linestyle="--")
    axes.text(1, -3, "third level (FUSION mixture), fitted after training", fontsize=7, color="#444444")
    box(17, -14, 17, 9, "image features (frozen,\nadapted), mean patches", GRAY)
    box(42, -14, 18, 9, "three prototype\nclassifiers", ORANGE)
    box(73, -14, 25, 9, "mixture with clip, cma, glr,\nfitted to validation images\n→ mixed logits", ORANGE)
    arrow((34.6, -9.5), (41.4, -9.5))
    arrow((60.6, -9.5), (72.4, -9.5), "3 heads")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Write both pictures; return the exit code."""
    argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)
    IMAGES.mkdir(parents=True, exist_ok=True)
    results = read_results((ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8"))
    for name, figure in (("accuracy_by_shots", draw_accuracy(results)), ("method", draw_method())):
        figure.savefig(IMAGES / f"{name}.png")
        print(IMAGES / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

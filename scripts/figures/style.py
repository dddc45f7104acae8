"""Style the project's figures, and write them.

Sizes suit a two-column paper at 100 %: one column 3.5 inches, both 7.16. Colors are Okabe and Ito's, which people with
any of the common kinds of color blindness tell apart; markers and line styles differ too, for print without color.
Nothing in a file depends on when or where it was made: the same data give the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dassl.utils import one_line

readable = one_line  # names in figures: fonts and SVG files cannot hold every character

COLUMN, PAGE = 3.5, 7.16  # inches
FORMATS = ("pdf", "svg", "png")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES = ("-", "--", "-.", ":")
GRAY = "#999999"

_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with Matplotlib, so it is the same everywhere
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "text.parse_math": False,  # names are names: "$5" is no formula
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # fonts that can be edited and searched
    "svg.fonttype": "path",
    "svg.hashsalt": "figures",  # ids that do not change from run to run
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Give figures the project's look within this context, whatever the user's own settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


class Look(NamedTuple):
    """Name the color, marker and line of one of several series."""

    color: str
    marker: str
    linestyle: str


def look(number: int) -> Look:
    """Return the look of series 0, 1, 2, ...; it is different for any 72 in a row."""
    return Look(COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)], LINES[number % len(LINES)])


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure, sizes in inches, without pyplot: it needs no window system and no global list."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_figure(figure: Figure, target: Any, kind: str) -> None:
    """Write a figure as "pdf", "svg" or "png" to a path or a binary stream; the moment of writing is left out."""
    metadata: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
    with style():
        figure.savefig(target, format=kind, metadata=metadata[kind])


def save(figure: Figure, stem: Path, formats: Sequence[str] = ("pdf", "png")) -> list[Path]:
    """Write `<stem>.<format>` for each format and return the paths; folders are made as needed."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in formats]
    for path, kind in zip(paths, formats, strict=True):
        write_figure(figure, path, kind)
    return paths


def add_output_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add `--output` and `--formats`; `default` says in words where figures go without `--output`."""
    parser.add_argument(
        "--output", type=Path, metavar="STEM", help=f"files to write, without .pdf (default: {default})"
    )
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=["pdf", "png"], help="kinds of files (default: pdf png)"
    )

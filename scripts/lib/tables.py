"""Statistics over seeds, and the tables made of them: Markdown, CSV, LaTeX.

A record is one finished run: dataset, method, shots, seed and a value in percent. Runs of one seed have the same
few-shot images whatever the method, so methods are compared by their differences seed by seed. In tables whose columns
are no numbers of shots, a column's name stands in their place.
"""

from __future__ import annotations

import csv
import html
import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from scipy import special, stats
from tabulate import tabulate

from dassl.utils import one_line

AVERAGE = "average"
LEVEL = 0.05  # significance level of the tests
SPREAD = "mean over seeds (standard deviation) ±half of the 95 % interval (of two seeds: of their range)"


Column = int | str  # a number of shots, or another column's name


BANDS = {"t95": "95 % t-interval of the mean over seeds", "sd": "± one standard deviation over seeds"}
OF_TWO = " (of two seeds: their range)"  # said where the first of these has points with two values


def harmonic(base: float, new: float) -> float:
    """Return the harmonic mean; 0 where both values are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def mean_and_band(values: Sequence[float], band: str = "t95") -> tuple[float, float]:
    """Return (mean, half the height of the band) of values; the band of a single value is nan.

    "t95": the 95 % confidence interval of the mean by Student's t with n - 1 degrees of freedom. Of two values it is
    their range instead: their t-interval is 13 times as wide as that, and tells nothing. "sd": the standard deviation
    (n - 1).
    """
    if band not in BANDS:
        raise ValueError(f'Expected band to be one of {", ".join(BANDS)} but got "{band}"')
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    sd = statistics.stdev(values)
    if band == "t95" and len(values) == 2:
        return mean, (max(values) - min(values)) / 2
    return mean, sd if band == "sd" else float(special.stdtrit(len(values) - 1, 0.975)) * sd / math.sqrt(len(values))


class Record(NamedTuple):
    """One finished run."""

    dataset: str
    method: str
    shots: Column
    seed: int
    value: float


Values = Mapping[int, float]  # seed -> value
Cells = dict[tuple[str, str, Column], dict[int, float]]  # (dataset, method, shots) -> values


class Summary(NamedTuple):
    """Hold the numbers of one cell of a table."""

    mean: float
    sd: float  # n - 1 in the denominator; nan for one seed
    half: float  # half the width of the 95 % t-interval of the mean, of two seeds half of their range; nan for one seed
    n: int


def summarize(values: Iterable[float]) -> Summary:
    """Return the mean, the standard deviation and the half-width of Student's 95 % interval; see `mean_and_band`.

    Raises:
        ValueError: there are no values.
    """
    values = list(values)
    if not values:
        raise ValueError("Expected at least one value but got none")
    mean, half = mean_and_band(values, "t95")
    return Summary(mean, mean_and_band(values, "sd")[1], half, len(values))


def paired_p(a: Values, b: Values) -> float:
    """Return the two-sided p of Student's t-test on the differences a - b over the seeds that both have.

    The value is 1 where the test says nothing: with fewer than two such seeds, and where all differences are the same.
    These have no spread to test against, however large they are.
    """
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    if len(differences) < 2 or max(differences) - min(differences) < 1e-9:
        return 1.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def significantly_best(column: Mapping[str, Values], higher: bool = True) -> str | None:
    """Return the method with the best mean if its difference to each of the others is significant; else None.

    Each single test is at the 5 % level: to claim that one method is better than all others, all tests must agree, and
    that needs no correction for their number.
    """
    if len(column) < 2:
        return None
    means = {method: statistics.fmean(values.values()) * (1 if higher else -1) for method, values in column.items()}
    best = max(means, key=means.__getitem__)
    others = [method for method in column if method != best]
    return best if all(paired_p(column[best], column[m]) < LEVEL and means[m] < means[best] for m in others) else None


def collect(records: Iterable[Record]) -> Cells:
    """Collect records into (dataset, method, shots) -> seed -> value.

    Where there are several datasets, "average" is one more. The average over datasets is taken seed by seed, of those
    (method, shots, seed) that all datasets have.

    Raises:
        ValueError: there are two records of one run.
    """
    cells: Cells = {}
    for record in records:
        seeds = cells.setdefault((record.dataset, record.method, record.shots), {})
        if record.seed in seeds:
            raise ValueError(f"Expected one value of {record[:4]} but got two")
        seeds[record.seed] = record.value
    datasets = list(dict.fromkeys(dataset for dataset, _, _ in cells))
    if len(datasets) > 1:
        for method, shots in dict.fromkeys((method, shots) for _, method, shots in cells):
            parts = [cells.get((dataset, method, shots), {}) for dataset in datasets]
            common = set(parts[0]).intersection(*parts[1:])
            if common:
                means = {seed: statistics.fmean(part[seed] for part in parts) for seed in sorted(common)}
                cells[AVERAGE, method, shots] = means
    return cells


def bold_cells(cells: Cells, higher: bool = True) -> set[tuple[str, str, Column]]:
    """Return the cells that are significantly the best of their dataset and number of shots."""
    found = set()
    for dataset, shots in dict.fromkeys((dataset, shots) for dataset, _, shots in cells):
        column = {m: values for (d, m, s), values in cells.items() if (d, s) == (dataset, shots)}
        best = significantly_best(column, higher)
        if best is not None:
            found.add((dataset, best, shots))
    return found


def markdown(cells: Cells, higher: bool = True, digits: int = 1) -> str:
    """Return a table per dataset, methods by shots: mean (standard deviation) ± half of `mean_and_band`."""
    bold = bold_cells(cells, higher)

    def cell(key: tuple[str, str, Column]) -> str:
        if key not in cells:
            return ""
        mean, sd, half, n = summarize(cells[key].values())
        shown = f"**{mean:.{digits}f}**" if key in bold else f"{mean:.{digits}f}"
        return shown if n == 1 else f"{shown} ({sd:.{digits}f}) ±{half:.{digits}f}"

    parts = []
    for dataset, methods, shots in _layout(cells):
        rows = [[_plain(m), *(cell((dataset, m, k)) for k in shots)] for m in methods]
        align = ["left", *["right"] * len(shots)]
        heads = ["method", *map(_heading, shots)]
        table = tabulate(rows, heads, tablefmt="pipe", disable_numparse=True, colalign=align)
        parts.append(f"### {_plain(dataset)}\n\n{table}\n")
    return "\n".join(parts)


def latex(cells: Cells, higher: bool = True, digits: int = 1) -> str:
    """Return a table per dataset for LaTeX with the package booktabs: mean and, as index, the standard deviation."""
    bold = bold_cells(cells, higher)

    def cell(key: tuple[str, str, Column]) -> str:
        if key not in cells:
            return ""
        mean, sd, _, n = summarize(cells[key].values())
        shown = f"\\mathbf{{{mean:.{digits}f}}}" if key in bold else f"{mean:.{digits}f}"
        return f"${shown}$" if n == 1 else f"${shown}_{{\\pm {sd:.{digits}f}}}$"

    lines = []
    for dataset, methods, shots in _layout(cells):
        lines += [f"% {_plain(dataset)}", f"\\begin{{tabular}}{{l{'r' * len(shots)}}}", "\\toprule"]
        lines += [" & ".join([_escape(dataset), *map(_short, shots)]) + " \\\\", "\\midrule"]
        lines += [" & ".join([_escape(m), *(cell((dataset, m, k)) for k in shots)]) + " \\\\" for m in methods]
        lines += ["\\bottomrule", "\\end{tabular}", ""]
    return "\n".join(lines)


def comma_separated(cells: Cells, higher: bool = True) -> str:
    """Return CSV with one row per dataset, method and number of shots, unrounded.

    Further columns: mean, sd, bounds of the interval (from three seeds), n, best (1 or 0), and the values by seed.
    """
    bold = bold_cells(cells, higher)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    third = "shots" if all(isinstance(column, int) for _, _, column in cells) else "column"
    writer.writerow(
        [
            "dataset",
            "method",
            third,
            "mean",
            "sd",
            "ci95_low",
            "ci95_high",
            "n",
            "best",
            "seeds",
        ]
    )
    for (dataset, method, shots), values in cells.items():
        mean, sd, half, n = summarize(values.values())
        spread = ["" if n < 2 else sd, *(["", ""] if n < 3 else [mean - half, mean + half])]
        by_seed = " ".join(f"{seed}:{value!r}" for seed, value in sorted(values.items()))
        writer.writerow(
            [_cell(dataset), _cell(method), shots, mean, *spread, n, int((dataset, method, shots) in bold), by_seed]
        )
    return stream.getvalue()


def _layout(cells: Cells) -> Iterable[tuple[str, Sequence[str], Sequence[Column]]]:
    for dataset in dict.fromkeys(dataset for dataset, _, _ in cells):
        methods = list(dict.fromkeys(m for d, m, _ in cells if d == dataset))
        columns = dict.fromkeys(k for d, _, k in cells if d == dataset)
        numbers = sorted(k for k in columns if isinstance(k, int))
        yield dataset, methods, [*numbers, *(k for k in columns if not isinstance(k, int))]


def _heading(column: Column) -> str:
    if isinstance(column, int):
        return f"{column} shot{'s' * (column != 1)}" if column > 0 else "all images"
    return _plain(column)


def _short(column: Column) -> str:
    return _escape(column) if isinstance(column, str) else str(column) if column > 0 else "all"


def _plain(name: str) -> str:
    """Return a name for a Markdown table: it begins no new cell and holds no HTML."""
    return html.escape(one_line(re.sub(r"[|`\s]+", " ", name)), quote=False)


def _escape(name: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", one_line(re.sub(r"[\\~^\s]+", " ", name)))


def _cell(name: str) -> str:
    """Return a name for a CSV file, such that no spreadsheet takes it for a formula."""
    line = one_line(name)
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line

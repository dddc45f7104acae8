"""Numbers as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; cells are shown as they are, the first column left-aligned."""
    align = ["left", *["right"] * (len(headers) - 1)]
    cells = [[str(cell) for cell in row] for row in rows]
    return tabulate(cells, headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def seconds(value: float) -> str:
    """1.234 s or 12.3 ms."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def gflops(flops: float) -> str:
    """In 10^9."""
    return f"{flops / 1e9:,.1f}" if flops < 1e12 else f"{flops / 1e9:,.0f}"


def gigabytes(size: float) -> str:
    """In 10^9 bytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def made_by(result: dict[str, Any]) -> str:
    """One line: command, machine, date."""
    m = result["machine"]
    where = m["gpu"] or f"{m['cpu']}, {m['threads']} of {m['cores']} cores"
    return f"`{m['command']}` ({where}; torch {m['torch']}; {m['date']})"

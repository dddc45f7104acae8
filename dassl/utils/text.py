"""Turn names from outside into text that breaks nothing it is put into."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["one_line", "place_name"]


def one_line(text: str, width: int = 0) -> str:
    """Return any text as one printable line, cut in the middle if longer than ``width`` characters (0: any length).

    White space becomes single spaces. Characters that cannot be printed (control characters, half of a surrogate pair,
    marks that turn the direction of writing) become "?".
    """
    line = " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in text).split())
    if width and len(line) > width:
        head = (width - 1) // 2
        line = f"{line[:head]}…{line[len(line) - (width - 1 - head) :]}"
    return line


def place_name(place: str | os.PathLike[str]) -> str:
    """Return what people call a folder or a CSV file of images: the last part of its path, without ".csv"."""
    path = Path(place).absolute()
    return path.stem if path.suffix.lower() == ".csv" else path.name

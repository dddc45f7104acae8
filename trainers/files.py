"""Files that are never seen half-written, also on a toolbox that has no such thing."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file at once or not at all; its folder is made when missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """The same for text, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_png(path: str | os.PathLike[str], figure: Any, **how: Any) -> None:
    """The same for a Matplotlib figure; `how` goes to its `savefig`."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", **how)
    write_bytes(path, picture.getvalue())

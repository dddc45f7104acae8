"""Write files that nobody ever sees half-written, also on a toolbox that cannot do so itself."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file at once or not at all; its folder is made when missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text in UTF-8, at once or not at all; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_png(path: str | os.PathLike[str], figure: Any, **how: Any) -> None:
    """Write a Matplotlib figure as a PNG, at once or not at all; `how` goes to its `savefig`."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", **how)
    write_bytes(path, picture.getvalue())

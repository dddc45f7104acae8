"""Files written so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

__all__ = ["atomic_write"]


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file for writing that appears under ``path`` only when the block ends without an error.

    The content goes to a temporary name in the same folder (created when missing), is flushed to the disk, and is then
    renamed over ``path``; on an error the temporary file is removed and an older file at ``path`` stays as it was.

    Args:
        path: the final name.
        mode: "w" (UTF-8 text) or "wb" (bytes).
    """
    if mode not in ("w", "wb"):
        raise ValueError(f'Expected mode to be "w" or "wb" but got "{mode}"')
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # uuid4 reads the system's entropy: Python's and torch's generators are left alone.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        # "x" creates the file with the user's ordinary permissions, which tempfile (0600) would not.
        with open(temporary, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise

"""Write files so that a reader never sees half of one, with checksums that tell whether a file has changed since."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from .errors import InputError

logger = logging.getLogger(__name__)

__all__ = [
    "atomic_write",
    "check_sum",
    "checked_write",
    "file_digest",
    "remove_checked",
    "remove_leftovers",
    "sum_file",
    "write_csv",
]

_PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def atomic_write(
    path: _PathLike, mode: str = "w", before_rename: Callable[[], None] = lambda: None, lasting: bool = True
) -> Iterator[IO[Any]]:
    """Open a file for writing that appears under ``path`` only when the block ends without an error.

    The content goes to a temporary name in the same folder (created when missing), is flushed to the disk, and is then
    renamed over ``path``; on an error the temporary file is removed and an older file at ``path`` stays as it was.

    Args:
        path: the final name.
        mode: "w" (UTF-8 text) or "wb" (bytes).
        before_rename: called when the content is on the disk, under its temporary name.
        lasting: wait until the new name is on the disk, too; else a power cut soon after may leave the older file.
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
        before_rename()
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if lasting:
        _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a power cut; do nothing where a folder cannot be synced (some network disks)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: _PathLike) -> None:
    """Remove what ``atomic_write`` left below ``folder`` when its process was killed.

    Call it only for a folder that no other process writes to.
    """
    for path in Path(folder).rglob(".*.tmp"):
        if re.search(r"\.[0-9a-f]{32}\.tmp$", path.name):
            with contextlib.suppress(OSError):
                path.unlink()


# ---- checksums


class _Summing:
    """A stream that knows the SHA-256 of what has been written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def sum_file(path: _PathLike) -> Path:
    """Return the path of a file's checksum, which lies beside it in the form of the program sha256sum."""
    path = Path(path)
    return path.with_name(f"{path.name}.sha256")


@contextlib.contextmanager
def checked_write(path: _PathLike) -> Iterator[Any]:
    """Open a file as ``atomic_write`` does in mode "wb", and write its checksum beside it.

    The stream has ``write`` and ``flush`` only. The checksum is that of the bytes written, not of the bytes that can be
    read back. While a file replaces an older one, the checksum's file holds both sums, so that it fits whichever of the
    two files a crash leaves.
    """
    path, sums = Path(path), sum_file(path)
    replaces = path.exists()
    summing: _Summing | None = None

    def write_sums(digests: list[str]) -> None:
        with atomic_write(sums, lasting=False) as stream:  # the file itself follows
            stream.writelines(f"{digest}  {path.name}\n" for digest in digests)

    def before_rename() -> None:
        assert summing is not None
        older = (_read_sums(path) or [file_digest(path)]) if replaces else []
        write_sums([summing.hexdigest(), *older])

    with atomic_write(path, "wb", before_rename) as stream:
        summing = _Summing(stream)
        yield summing
    if replaces:
        write_sums([summing.hexdigest()])


def remove_checked(path: Path) -> None:
    """Remove a file and its checksum."""
    path.unlink(missing_ok=True)
    sum_file(path).unlink(missing_ok=True)


def _read_sums(path: Path) -> list[str]:
    """Return the checksums noted for a file: more than one after a crash, none where none is noted."""
    try:
        text = sum_file(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError):
        text = ""
    found = re.findall(r"^([0-9a-f]{64}) [ *]", text, re.MULTILINE)
    if not found:
        logger.warning('Expected a checksum in "%s" but found none: the file is read unchecked', sum_file(path))
    return found


def file_digest(path: Path) -> str:
    """Compute the SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def check_sum(path: _PathLike) -> None:
    """Check a file against the checksum beside it; a file without one (made by another program) passes.

    Raises:
        InputError: the file is not the one that was written.
    """
    path = Path(path)
    known = _read_sums(path)
    if known and file_digest(path) not in known:
        raise InputError(
            f'Expected "{path}" to have the checksum in "{sum_file(path).name}" but it has another one: it is damaged, '
            "or was changed (on purpose? then remove that file)"
        )


def write_csv(path: _PathLike, rows: Iterable[Iterable[Any]]) -> None:
    """Write rows, the head first, to a CSV file in UTF-8."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with atomic_write(path, "wb") as stream:  # names of files need not be text
        stream.write(text.getvalue().encode("utf-8", "surrogateescape"))

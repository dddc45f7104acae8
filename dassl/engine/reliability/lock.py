"""One output folder, one run: a lock that tells who has it.

The file ``run.lock`` in the folder names the process that holds it. Where the file system knows ``flock``, the system
keeps the lock and drops it when the process ends, however it ends. Elsewhere, or if the holder is on another machine
(whose locks may not be seen here), what the file says counts. A holder on this machine has the folder as long as that
very process lives. A holder on another machine has it if it has touched the file within the last STALE seconds, which
it does every BEAT seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from dassl.utils.errors import InputError

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

__all__ = ["FolderLock", "is_locked"]

NAME = "run.lock"
BEAT = 30.0  # seconds
STALE = 300.0  # seconds


class FolderLock:
    """Hold a folder until ``release``; the folder is made when missing.

    Raises:
        InputError: another process has the folder; the message says which, where, and since when.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.path = self.folder / NAME
        self.folder.mkdir(parents=True, exist_ok=True)
        self._handle: int | None = self._take()
        self._ended = threading.Event()
        self._write()
        # A forked process (a loader's worker) may outlive this one for a while: it gives the lock up at once.
        os.register_at_fork(after_in_child=self._drop)
        threading.Thread(target=self._beat, name="run.lock", daemon=True).start()

    def _take(self) -> int:
        tries = 0
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                holder = _holder(self.path)
                free = _flock(handle)
                tries += 1
                if free is False and holder is None and tries < 20:  # the holder is about to say who it is
                    os.close(handle)
                    time.sleep(0.05)
                    continue
                if free is False or (holder is not None and _lives(holder, self.path, flocked=free is True)):
                    raise InputError(
                        f'Expected "{self.folder}" to be used by one run at a time but {_told(holder)}: '
                        f"wait for that run, stop it, or choose another folder (--output-dir){_hint(holder)}"
                    )
                if _same_file(handle, self.path):  # else the last holder has just removed the file
                    if holder is not None:
                        logger.warning('Taking over "%s": %s, and has ended', self.folder, _told(holder))
                    return handle
            except InputError:
                os.close(handle)
                raise
            os.close(handle)

    def _write(self) -> None:
        record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        assert self._handle is not None
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"{json.dumps(record)}\n".encode(), 0)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _drop(self) -> None:
        """Close this process's handle; in a forked process this leaves the lock to the parent alone."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def release(self) -> None:
        """Give the folder back; this is harmless if it was done before."""
        self._ended.set()
        if self._handle is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self._drop()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def is_locked(folder: str | os.PathLike[str]) -> bool:
    """Return whether a run holds this folder."""
    path = Path(folder) / NAME
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        holder, free = _holder(path), _flock(handle)
        return free is False or (holder is not None and _lives(holder, path, flocked=free is True))
    finally:
        os.close(handle)


def _flock(handle: int) -> bool | None:
    """Take the lock if it is free, and return whether it was; None: this file system has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _same_file(handle: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    ours = os.fstat(handle)
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def _holder(path: Path) -> dict[str, Any] | None:
    """Return what the file says of the holder; None: nothing."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(record, dict) and isinstance(record.get("pid"), int) and isinstance(record.get("host"), str)
    return record if known else None


def _lives(holder: dict[str, Any], path: Path, flocked: bool) -> bool:
    """Return whether the process that the file names still runs, as far as can be told from here."""
    if holder["host"] != socket.gethostname():
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime < STALE
        return False
    if flocked:  # a living holder on this machine would have kept us from the lock
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it lives, and is somebody else's
    start = _process_start(holder["pid"])  # another process may have got its number
    return start is None or holder.get("process_start") in (None, start)


def _process_start(pid: int) -> int | None:
    """Return when a process of this machine began, in clock ticks since boot; None: it cannot be told."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _hint(holder: dict[str, Any] | None) -> str:
    if holder is None or holder["host"] == socket.gethostname():
        return ""
    return f". If it is gone, this folder is free {STALE / 60:.0f} minutes after"


def _told(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another process has it"
    return f"process {holder['pid']} on {holder['host']} has had it since {holder.get('since', 'some time ago')}"

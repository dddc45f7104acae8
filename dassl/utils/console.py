"""Cope with a stdout or stderr that is not UTF-8, or whose reader has closed it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["Unbroken", "run_main", "silence", "write_any_name"]


def write_any_name(*streams: Any) -> None:
    r"""Let text streams write characters that their encoding lacks as "\xe9" or "\u0101", instead of raising an error.

    Args:
        streams: the streams; none given: stdout and stderr. A stream that cannot be changed (a test's, a notebook's) is
            left alone.
    """
    for stream in streams or (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")


def silence(stream: Any) -> None:
    """Drop what is written to a stream from now on: its reader is gone, and Python would complain at each line."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Unbroken:
    """A text stream whose writes never fail: once its reader is gone, what is written to it is dropped."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError:
            silence(self.stream)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            silence(self.stream)

    def __eq__(self, other: object) -> bool:  # tqdm asks whether a bar and a line go to one stream
        return self.stream == getattr(other, "stream", other)

    def __hash__(self) -> int:
        return hash(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run_main(main: Callable[[], int]) -> int:
    """Run a command line on this process's streams and return its exit code.

    Characters that the console cannot show are escaped. If stdout's reader has gone (``| head``), the command ends
    quietly with the code 0.
    """
    write_any_name()
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
            return 0
        silence(sys.stderr)
        return 0
    return code

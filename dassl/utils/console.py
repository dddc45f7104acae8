"""stdout and stderr as they are met: not UTF-8, or closed by whoever was reading them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["Unbroken", "run_main", "silence", "write_any_name"]


def write_any_name(*streams: Any) -> None:
    r"""Have text streams write what their encoding cannot as "\xe9" or "\u0101", instead of raising an error.

    Args:
        streams: none: stdout and stderr. Those that cannot be changed (a test's, a notebook's) are left alone.
    """
    for stream in streams or (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")


def silence(stream: Any) -> None:
    """Send what a stream still gets to nowhere: whoever read it is gone, and Python would complain at each line."""
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
    """Run a command line on this process's streams; returns its exit code.

    Names that the console cannot show are escaped. Where stdout's reader has seen enough (``| head``), the command ends
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

"""End a run at SIGTERM or SIGINT (Ctrl-C) at a point from which it can be resumed.

While a program is ``watching``, a signal raises a StoppedError. Inside of ``postponed`` the first signal is only noted,
and the code that runs there asks ``noted()`` when it has come to a good place. A second signal raises at once in any
case, and a third one ends the process as if nobody had been watching. The same signal twice within AT_ONCE seconds
counts once: whoever tells all processes of a job to end also tells torchrun, which passes the signal on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

__all__ = ["StoppedError", "forget", "ignore_further", "noted", "postponed", "watching"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AT_ONCE = 1.0  # seconds


class StoppedError(BaseException):
    """The run was told to end.

    Attributes:
        number: number of the signal.
        kept: whether all work until then is in a checkpoint.
    """

    def __init__(self, number: int, kept: bool = False) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.kept = kept

    @property
    def exit_code(self) -> int:
        """The exit code that shells report for the signal: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number


class _State:
    """The state of this process; one for all callers, as signals are."""

    pid = 0  # id of the process that is watching; 0: none
    count = 0  # signals that have come
    last = (0, 0.0)  # number and time of the newest signal
    number = 0  # number of the signal that was noted; 0: none
    postponing = False


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Let SIGTERM and SIGINT raise StoppedError while the block runs.

    A signal that the process was started to ignore stays ignored. Outside of the main thread, and inside of another
    ``watching``, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or _State.pid == os.getpid():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _State.pid, _State.count, _State.number, _State.postponing = os.getpid(), 0, 0, False
    _State.last = 0, 0.0
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _handle)
    try:
        yield
    finally:
        if _State.pid == os.getpid():
            _State.pid, _State.number = 0, 0
            for number, handler in before.items():
                if handler is not None:  # None: it was set by something that is not Python
                    signal.signal(number, handler)


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _State.pid:  # a process forked off this one, such as a loader's worker
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    (before, when), now = _State.last, time.monotonic()
    if number == before and now - when < AT_ONCE:
        return
    _State.last = number, now
    _State.count += 1
    if _State.count == 1 and _State.postponing:
        _State.number = number
        return
    if _State.count > 1:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
    raise StoppedError(number)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Note the first signal while the block runs, instead of raising; unless forgotten, it raises at the end."""
    _State.postponing = True
    try:
        yield
    finally:
        _State.postponing = False
    if _State.number:
        raise StoppedError(_State.number)


def noted() -> int:
    """Return the number of the signal that came inside of ``postponed``; 0: none."""
    return _State.number


def forget() -> None:
    """Forget the signal that was noted, after it has been acted on."""
    _State.number = 0


def ignore_further() -> None:
    """Ignore all further signals, so that this process, which is ending, can still say why."""
    main = threading.current_thread() is threading.main_thread()  # no other thread may change what a signal does
    if main and _State.pid == os.getpid():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

"""SIGTERM and SIGINT (Ctrl-C): a run ends where it can be gone on with.

While a program is ``watching``, a signal raises a StoppedError; inside of ``postponed`` the first one is only noted,
and whoever runs there asks ``noted()`` when it has come to a good place. A second one raises at once in any case, and
a third one ends the process as if nobody had been watching. One that comes twice at once counts once: what tells all
processes of a job to end also tells torchrun, which passes it on.
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
        number: of the signal.
        kept: whether what was done until then is in a checkpoint.
    """

    def __init__(self, number: int, kept: bool = False) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.kept = kept

    @property
    def exit_code(self) -> int:
        """What shells give for it: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number


class _State:
    """Of the process: signals are."""

    pid = 0  # of the process that is watching; 0: none
    count = 0  # signals that have come
    last = (0, 0.0)  # number and time of the newest of them
    number = 0  # of the one that was noted
    postponing = False


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """While it lasts, SIGTERM and SIGINT raise StoppedError; those that the process was started to ignore stay ignored.

    Outside of the main thread, and inside of another ``watching``, it does nothing.
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
    """While it lasts, the first signal is only noted. One that nobody has asked for raises at the end."""
    _State.postponing = True
    try:
        yield
    finally:
        _State.postponing = False
    if _State.number:
        raise StoppedError(_State.number)


def noted() -> int:
    """The number of the signal that came inside of ``postponed``; 0: none."""
    return _State.number


def forget() -> None:
    """The signal that was noted has been acted on."""
    _State.number = 0


def ignore_further() -> None:
    """This process is ending and is to say why: a signal, which ends others too, may not cut it short."""
    main = threading.current_thread() is threading.main_thread()  # no other one may change what a signal does
    if main and _State.pid == os.getpid():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

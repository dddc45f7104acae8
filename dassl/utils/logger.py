"""Send the lines of a run to the console and to log.txt.

Code of this project writes with ``logging``. Trainers written for upstream use ``print``, and their lines belong in
log.txt too, so stdout is copied into the same file by a tee. Logged lines go to the console and to the file directly,
not through the tee: a later replacement of ``sys.stdout`` cannot lose or double them.

log.txt has every line. The console may have fewer: a record that is logged with ``extra=DETAIL`` is shown there only if
all lines are asked for, and of a quiet run only warnings and what is logged with ``extra=RESULT``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from dassl.upstream_names import upstream_name

from .console import silence, write_any_name

__all__ = [
    "ALL_LINES",
    "DETAIL",
    "LOG_NAME",
    "MAIN_LINES",
    "QUIET",
    "RESULT",
    "Logger",
    "close_logger",
    "ensure_heard",
    "is_quiet",
    "muted",
    "note_in_log",
    "setup_logger",
    "take_log_name",
    "warnings_so_far",
]

LOG_NAME = "log.txt"

QUIET, MAIN_LINES, ALL_LINES = 0, 1, 2  # what the console shows
DETAIL: Mapping[str, object] = {"detail": True}  # for log.txt, and for a console with ALL_LINES
RESULT: Mapping[str, object] = {"result": True}  # for a QUIET console, too


class Logger:
    """A text stream that copies what is written to the console into a file.

    Args:
        fpath: the file to write; its folder is made when missing. None: console only.
    """

    def __init__(self, fpath: str | os.PathLike[str] | None = None) -> None:
        self.console: Any = sys.stdout
        self.file: IO[str] | None = None
        if fpath is not None:
            Path(fpath).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(fpath, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed by close)

    def write(self, msg: str) -> int:
        try:
            self.console.write(msg)
        except OSError as error:
            _lose(self.console, error, None if self.file is None else self.file.name)
        if self.file is not None:
            try:
                self.file.write(msg)
            except OSError as error:
                self.give_up(error)
        return len(msg)

    def flush(self) -> None:
        try:
            self.console.flush()
        except OSError as error:
            _lose(self.console, error, None if self.file is None else self.file.name)
        if self.file is not None and not self.file.closed:
            self.file.flush()

    def give_up(self, error: OSError) -> None:
        """Stop writing the file, with one warning: the run goes on without its log."""
        if self.file is not None:
            name = self.file.name
            self.close()
            print(f"warning: {name} cannot be written, it ends here: {error.strerror or error}", file=sys.stderr)

    def close(self) -> None:
        """Close the file; the console stays open, since it is not ours."""
        if self.file is not None:
            file, self.file = self.file, None
            with contextlib.suppress(OSError):  # what a full disk has not taken
                file.close()

    def __enter__(self) -> Logger:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:  # isatty, encoding, fileno, ...: those of the console
        if name == "console":  # not there yet: __init__ failed, or a copy is being unpickled
            raise AttributeError(name)
        return getattr(self.console, name)


def _lose(console: Any, error: OSError, log: str | None) -> None:
    """Go on without a console, with one warning, after its reader has gone (``| head``, a closed terminal)."""
    silence(console)
    where = "its lines are lost" if log is None else f"its lines are in {log}"
    message = f"warning: stdout cannot be written any more ({error.strerror or error}): the run goes on, {where}"
    note_in_log(message)
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:  # stderr's reader is gone, too
        silence(sys.stderr)


class _Handler(logging.StreamHandler):
    """A handler that is silent once its stream is closed, as a console borrowed by a test or a notebook may be."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(self.stream, "closed", False):
            super().emit(record)

    def flush(self) -> None:
        if not getattr(self.stream, "closed", False):
            super().flush()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        error = sys.exc_info()[1]
        tee = None if _active is None else _active.tee
        if isinstance(error, OSError) and tee is not None and self.stream is tee.file:
            tee.give_up(error)
        elif isinstance(error, OSError):
            _lose(self.stream, error, None if tee is None or tee.file is None else tee.file.name)
        else:
            super().handleError(record)


class _Fallback(logging.Handler):
    """A handler that shows this project's lines on stdout where nobody has set logging up, as upstream's prints do.

    Lines go to ``sys.stdout`` as it is at that moment: other programs replace it to keep a log of their own.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:  # somebody has set logging up meanwhile
            drop_fallback()
            return
        try:
            print(self.format(record), file=sys.stdout, flush=True)
        except OSError as error:
            _lose(sys.stdout, error, None)


_PROJECT = ("dassl", "trainers", "datasets", "dlr_clip")  # names of our loggers
_fallback: _Fallback | None = None
_muted = False  # whether `muted` is in force


def ensure_heard() -> None:
    """Let the lines of this project reach stdout unless logging is set up; whoever builds a run calls this."""
    global _fallback
    if _fallback is None and not logging.getLogger().handlers:
        _fallback = _Fallback()
        for name in _PROJECT:
            logging.getLogger(name).addHandler(_fallback)
            logging.getLogger(name).setLevel(logging.INFO)


def drop_fallback() -> None:
    """Undo ``ensure_heard``."""
    global _fallback
    if _fallback is not None:
        for name in _PROJECT:
            logging.getLogger(name).removeHandler(_fallback)
            logging.getLogger(name).setLevel(logging.NOTSET)
        _fallback = None


class _Active:
    """The state before ``setup_logger``, and what it added, so that ``close_logger`` can undo it."""

    def __init__(self) -> None:
        self.tee: Logger | None = None
        self.stdout: Any = sys.stdout
        self.handlers: list[logging.Handler] = []
        self.level = logging.WARNING
        self.shown = ALL_LINES
        self.warnings: dict[str, None] = {}  # each once, in the order of their coming

    def is_for_console(self, record: logging.LogRecord) -> bool:
        """Return whether the console shows a record; note the warnings."""
        if record.levelno >= logging.WARNING:
            self.warnings[record.getMessage()] = None
            return True
        if self.shown == QUIET:
            return hasattr(record, "result")
        return self.shown == ALL_LINES or not hasattr(record, "detail")


_active: _Active | None = None


def _is_wanted(record: logging.LogRecord) -> bool:
    """Drop the chatter of libraries that log to the nameless root logger; warnings always pass."""
    installed = "site-packages" in record.pathname or "dist-packages" in record.pathname
    return record.levelno >= logging.WARNING or record.name != "root" or not installed


def _free_name(path: Path, when: float | None = None) -> Path:
    """Return ``path`` if nothing is there, else that path with a time appended.

    The time is ``when``, or now if it is None; a number follows where a name with the same second is taken.
    """
    if not path.exists():
        return path
    stamped = path.with_name(path.name + time.strftime("-%Y-%m-%d-%H-%M-%S", time.localtime(when)))
    candidate, number = stamped, 1
    while candidate.exists():
        number += 1
        candidate = stamped.with_name(f"{stamped.name}-{number}")
    return candidate


def take_log_name(folder: str | os.PathLike[str]) -> None:
    """Rename this run's log in ``folder`` to ``log.txt``; a log.txt of an earlier run is renamed first.

    This is called when ``metrics.json`` is written, so that both files are of one run. The earlier log's new name ends
    in the time at which that log was last written. Nothing happens if this run logs elsewhere, or if its log has the
    name already.
    """
    file = None if _active is None or _active.tee is None else _active.tee.file
    wanted = Path(folder) / LOG_NAME
    if file is None or Path(file.name).parent.absolute() != wanted.parent.absolute() or Path(file.name) == wanted:
        return
    with contextlib.suppress(OSError):  # some systems do not rename open files: the logs then keep their names
        if wanted.exists():
            wanted.rename(_free_name(wanted, wanted.stat().st_mtime))
        Path(file.name).rename(wanted)


def setup_logger(output: str | os.PathLike[str] | None = None, rank: int = 0, shown: int = ALL_LINES) -> Path | None:
    """Send log records and stdout to the console and to a file; calling this again replaces the earlier set-up.

    Args:
        output: folder for ``log.txt``, or a file name ending in .txt or .log. If the file exists, the time is appended
            to the name, so that an older log stays. None: console only.
        rank: number of this process among several. Processes above 0 write warnings only, to stderr and with their
            number, and what they print is dropped.
        shown: what of the records the console shows: QUIET, MAIN_LINES or ALL_LINES.

    Returns:
        The log file's path, or None.
    """
    global _active
    close_logger()
    drop_fallback()
    active = _Active()
    active.shown = shown
    console = sys.stderr if rank > 0 else sys.stdout
    write_any_name(console)
    streams: list[Any] = [console]
    path = None
    if rank > 0:
        active.tee = Logger()
        active.tee.console = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (closed by close_logger)
        sys.stdout = active.tee
    elif output is not None and os.fspath(output) != "":
        path = Path(output)
        if path.suffix not in (".txt", ".log"):
            path = path / LOG_NAME
        path = _free_name(path)
        active.tee = Logger(path)
        sys.stdout = active.tee
        streams.append(active.tee.file)

    root = logging.getLogger()
    active.level = root.level
    root.setLevel(logging.WARNING if rank > 0 else logging.INFO)
    for stream in streams:
        handler = _Handler(stream)
        handler.setFormatter(logging.Formatter(f"rank {rank}: %(message)s" if rank > 0 else "%(message)s"))
        handler.addFilter(_is_wanted)
        if stream is console:
            handler.addFilter(active.is_for_console)
        root.addHandler(handler)
        active.handlers.append(handler)
    _active = active
    return path


def is_quiet() -> bool:
    """Return whether the console is to show warnings and results only."""
    return _muted or (_active is not None and _active.shown == QUIET)


@contextlib.contextmanager
def muted(level: int = logging.WARNING) -> Iterator[None]:
    """Show only this project's lines from a level on, within this block; progress bars go with ``logging.INFO``."""
    global _muted
    ensure_heard()
    before = {name: logging.getLogger(name).level for name in _PROJECT}
    outer, _muted = _muted, level > logging.INFO
    try:
        for name in _PROJECT:
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        _muted = outer
        for name, old in before.items():
            logging.getLogger(name).setLevel(old)


def warnings_so_far() -> list[str]:
    """Return the warnings since ``setup_logger``, each once; without it there are none."""
    return [] if _active is None else list(_active.warnings)


def note_in_log(message: str) -> None:
    """Write a line to log.txt alone; it is for messages that are also printed on stderr."""
    file = None if _active is None or _active.tee is None else _active.tee.file
    if file is not None:
        with contextlib.suppress(OSError, ValueError):  # the message may be about a full disk
            file.write(f"{message}\n")


def close_logger() -> None:
    """Undo setup_logger, if it is in force: remove its handlers, restore stdout, close the file."""
    global _active
    if _active is None:
        return
    root = logging.getLogger()
    for handler in _active.handlers:
        root.removeHandler(handler)
        handler.flush()
    root.setLevel(_active.level)
    if _active.tee is not None:
        if sys.stdout is _active.tee:  # somebody may have put another stream there since: leave that one alone
            sys.stdout = _active.stdout
        if _active.tee.console is not _active.stdout:
            _active.tee.console.close()
        _active.tee.close()
    _active = None


def __getattr__(name: str) -> Any:  # names that upstream's module offers, too
    return upstream_name(__name__, name)

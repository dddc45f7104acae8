"""Errors that mean "the user gave something wrong", as opposed to a bug in the code."""

from __future__ import annotations

import dis
import re
from typing import Any

import yaml

# torch's DataLoader re-raises an exception of a worker process with the same type and the whole traceback as message.
_WORKER_PREFIX = re.compile(r"\ACaught \w+ in DataLoader worker process \d+\.\n")
_LAST_EXCEPTION = re.compile(r"^(?:\w+\.)*InputError: (.*)\Z", re.DOTALL | re.MULTILINE)


class InputError(ValueError):
    """Something the user gave (a file, a config value, a name) is wrong; ``str`` of it is fit for one printed line.

    An InputError raised in a DataLoader worker arrives in the main process with the worker's traceback as its message.
    The message is cut back to the original one here, and the traceback is kept in ``worker_traceback``.
    """

    worker_traceback: str = ""

    def __init__(self, message: str = "") -> None:
        if _WORKER_PREFIX.match(message):
            found = _LAST_EXCEPTION.search(message)
            if found:
                self.worker_traceback = message
                message = found.group(1).strip()
        super().__init__(message)

    def __str__(self) -> str:  # spelt out because KeyError, a base of UnknownNameError, would print the repr
        return str(self.args[0]) if self.args else ""


class UnknownNameError(InputError, KeyError):
    """A name that no registry entry or config key has. Also a KeyError, as callers of upstream's registry expect."""


# Top-level packages in which a `raise` of a ValueError or an OSError is about what the user gave: the toolbox, and
# packages that have registered something (a trainer, a dataset).
_CHECKING_PACKAGES = {__name__.partition(".")[0]}


def note_package(registered: Any) -> None:
    """Note that the package of a registered class or function checks what it is given; `given_wrongly` uses this."""
    _CHECKING_PACKAGES.add(str(getattr(registered, "__module__", "")).partition(".")[0])


def given_wrongly(error: BaseException) -> bool:
    """Return whether an error during set-up means that something given was wrong; else the error is a bug.

    These errors do: an InputError or a YAML error; an OSError that names a file; and a ValueError or OSError that was
    raised on purpose, by a ``raise`` statement in this toolbox or in a package that has registered something.
    """
    if isinstance(error, (InputError, yaml.YAMLError)):
        return True
    if not isinstance(error, (ValueError, OSError)):
        return False
    if isinstance(error, OSError) and error.filename is not None:
        return True
    last = error.__traceback__
    if last is None:
        return False
    while last.tb_next is not None:
        last = last.tb_next
    code, package = last.tb_frame.f_code, str(last.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS" and package in _CHECKING_PACKAGES

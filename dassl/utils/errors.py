"""Errors that mean "the user gave something wrong", as opposed to a bug in the code."""

from __future__ import annotations

import re

# How torch's DataLoader re-raises an exception of a worker process: same type, one string with the whole traceback.
_WORKER_PREFIX = re.compile(r"\ACaught \w+ in DataLoader worker process \d+\.\n")
_LAST_EXCEPTION = re.compile(r"^(?:\w+\.)*InputError: (.*)\Z", re.DOTALL | re.MULTILINE)


class InputError(ValueError):
    """Something the user gave (a file, a config value, a name) is wrong; ``str`` of it is fit for one printed line.

    An InputError raised in a DataLoader worker arrives in the main process with the worker's traceback as its message:
    it is cut back to the original message here, and the traceback is kept in ``worker_traceback``.
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

"""What command lines share: one line on stderr and exit code 2 for whatever was given wrong."""

from __future__ import annotations

import argparse
import sys
import traceback
from typing import NoReturn

import yaml

from .console import run_main
from .errors import InputError, given_wrongly
from .text import one_line

__all__ = ["SETUP_ERRORS", "Parser", "fail", "given_wrongly", "run_main"]

# While things are set up, these may mean that something given was wrong: `given_wrongly` says whether one does. Once a
# run is going, only InputError does.
SETUP_ERRORS = (InputError, ValueError, KeyError, OSError, yaml.YAMLError)

MESSAGE_LENGTH = 1500  # characters: what came may be a whole file in one line


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message, MESSAGE_LENGTH)} (see --help)\n")


def fail(error: BaseException, debug: bool = False) -> int:
    """Say an error in one line on stderr, after its traceback if ``debug``; returns the exit code, 2."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        message = f"{error.strerror}: {error.filename}"
    elif isinstance(error, KeyError) and error.args:
        message = str(error.args[0])  # str() of a KeyError would be the message's repr
    else:
        message = str(error) or type(error).__name__
    print(f"error: {one_line(message, MESSAGE_LENGTH)}", file=sys.stderr)
    return 2

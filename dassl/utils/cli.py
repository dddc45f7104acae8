"""Helpers of all command lines: one line on stderr and exit code 2 for whatever was given wrong.

Nothing here needs torch, so help and errors in the arguments alone come at once.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .console import run_main
from .errors import InputError, given_wrongly
from .text import one_line

__all__ = ["SETUP_ERRORS", "Parser", "fail", "given_wrongly", "parse_first", "registered_names", "run_main"]

# While a run is being set up, these errors may mean that something given was wrong: `given_wrongly` says whether one
# does. Once the run is going, only an InputError means that.
SETUP_ERRORS = (InputError, ValueError, KeyError, OSError, yaml.YAMLError)

MESSAGE_LENGTH = 1500  # characters: a message may quote a whole file in one line


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and whose flags must be written out in full.

    Args:
        closing: called for the text below the help when help is asked for.
    """

    def __init__(self, *arguments: Any, closing: Callable[[], str] | None = None, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        self.closing = closing

    def format_help(self) -> str:
        if self.closing is not None:
            self.epilog = self.closing()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message, MESSAGE_LENGTH)} (see --help)\n")


def parse_first(parse: Callable[[], Any]) -> None:
    """Parse this program's arguments before the imports that take seconds, so that help and errors come at once.

    Call it where the program starts. In a run of several processes it does nothing: the program parses once the
    processes know each other, because the others would wait for a process that ended alone.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        run_main(lambda: int(parse() is None))


def registered_names(folder: Path, registry: str) -> list[str]:
    """Return the names of the classes that the source files below a folder register, in order; nothing is imported.

    Args:
        folder: a package.
        registry: the registry's name in the sources: classes with the decorator ``@<registry>.register()`` count.
    """
    names = []
    for path in folder.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if f"@{registry}.register" in source:
            names += [
                node.name
                for node in ast.parse(source).body
                if isinstance(node, ast.ClassDef)
                and any(ast.unparse(decorator).startswith(f"{registry}.register(") for decorator in node.decorator_list)
            ]
    return sorted(names, key=str.lower)


def fail(error: BaseException, debug: bool = False) -> int:
    """Print an error as one line on stderr, after its traceback if ``debug``, and return the exit code, 2."""
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

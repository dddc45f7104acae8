"""Import packages that only some commands need."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import InputError


def needed_package(name: str, purpose: str, extra: str = "", advice: str = "") -> Any:
    """Import and return a package.

    Args:
        name: of the package.
        purpose: what needs it, for the message.
        extra: of this project, that has it; "": none.
        advice: what else may be done, for the message.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        wanted = f"'dlr-clip[{extra}]'" if extra else name
        raise InputError(
            f"Expected the package {name} for {purpose} but it is not installed: pip install {wanted}{advice}"
        ) from error

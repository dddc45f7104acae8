"""Check configuration values, with messages that say what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def _value(cfg: Any, path: str) -> Any:
    for key in path.split("."):
        cfg = cfg[key]
    return cfg


def check_choice(cfg: Any, path: str, choices: Sequence[str]) -> None:
    """ValueError unless the key at `path` is one of `choices`."""
    value = _value(cfg, path)
    if value not in choices:
        raise ValueError(f"Expected {path} to be one of {', '.join(choices)} but got {value!r}")


def check_bool(cfg: Any, path: str) -> None:
    """ValueError unless the key at `path` is True or False."""
    value = _value(cfg, path)
    if not isinstance(value, bool):
        raise ValueError(f"Expected {path} to be True or False but got {value!r}")


def check_whole(cfg: Any, path: str, low: int = 1) -> None:
    """ValueError unless the key at `path` is a whole number of at least `low`."""
    value = _value(cfg, path)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"Expected {path} to be a whole number, at least {low}, but got {value!r}")


def check_number(cfg: Any, path: str, low: float, high: float, *, open_low: bool = False) -> None:
    """ValueError unless the key at `path` is a finite number in [low, high] (`open_low`: above low)."""
    value = _value(cfg, path)
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or not low <= value <= high or (open_low and value == low) or abs(value) == float("inf"):
        bounds = f"{'above' if open_low else 'at least'} {low:g} and at most {high:g}"
        raise ValueError(f"Expected {path} to be a number, {bounds}, but got {value!r}")


def check_words(cfg: Any, path: str) -> None:
    """ValueError unless the key at `path` is text without a placeholder; it may be empty."""
    value = _value(cfg, path)
    if not isinstance(value, str) or "{" in value:
        raise ValueError(f"Expected {path} to be words such as 'a photo of a', or '', but got {value!r}")

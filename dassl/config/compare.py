"""Find the settings that differ between two runs, and tell which of them matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

__all__ = ["INDIFFERENT", "REPORTS", "Difference", "differing", "plain_config"]

# Settings that say where, how fast and how safely a run computes, not what it computes. Runs that differ in these only
# are the same run. A node's name stands for all keys in it.
INDIFFERENT = (
    "OUTPUT_DIR",
    "RESUME",
    "VERBOSE",
    "LOGGER",
    "DIST",
    "DATASET.ROOT",
    "DATALOADER.NUM_WORKERS",
    "DATALOADER.CACHE_IMAGES",
    "FEATURE_CACHE",
    "INPUT.VIEWS_MEMORY",
    "TRAIN.PRINT_FREQ",
    "TRAIN.CHECKPOINT_FREQ",
    "TRAIN.CHECKPOINT_STEPS",
    "TRAIN.CHECKPOINT_MINUTES",
    "TRAIN.CHECKPOINTS_KEPT",
    "TRAIN.FORCE_RESUME",
    "TRAIN.ON_NAN",  # steps before a checkpoint were finite, or were left out and counted there
    "TRAIN.ON_NAN_LIMIT",
)
# Settings that say what is written beside the results; the results themselves stay the same.
REPORTS = ("TEST.COMPUTE_CMAT", "TEST.PER_CLASS_RESULT", "TEST.PREDICTIONS_MB")


class Difference(NamedTuple):
    """A setting with its two values."""

    key: str
    there: Any
    here: Any


def plain_config(cfg: Any) -> dict[str, Any]:
    """Return a config as its YAML file has it: nested dicts, with lists instead of tuples."""
    return {key: _plain(value) for key, value in cfg.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return plain_config(value)
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def differing(
    there: Mapping[str, Any], here: Mapping[str, Any], indifferent: tuple[str, ...] = INDIFFERENT
) -> Iterator[Difference]:
    """Yield the settings that both configs have with different values.

    A setting that only one of them has, such as one that an older version did not know, is left out.

    Args:
        there, here: as ``plain_config`` gives them.
        indifferent: names that are left out, of keys or of whole nodes.
    """
    return _differing(there, here, indifferent, "")


def _differing(
    there: Mapping[str, Any], here: Mapping[str, Any], indifferent: tuple[str, ...], prefix: str
) -> Iterator[Difference]:
    for key, value in here.items():
        name = prefix + key
        if key not in there or name in indifferent:
            continue
        if isinstance(value, Mapping) and isinstance(there[key], Mapping):
            yield from _differing(there[key], value, indifferent, f"{name}.")
        elif there[key] != value:
            yield Difference(name, there[key], value)

"""Lay out grids of settings, and choose the best point by its scores on validation images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Axis(NamedTuple):
    """`steps` evenly spaced values from `start` up to `end`; `end` itself is left out unless `closed`."""

    start: float
    end: float
    steps: int
    closed: bool = False

    def values(self) -> list[float]:
        """Return the values of the axis in rising order."""
        gaps = max(1, self.steps - 1) if self.closed else self.steps
        return [self.start + i * (self.end - self.start) / gaps for i in range(self.steps)]


def best_place(scores: Tensor, rank: Callable[[tuple[int, ...]], Any] | None = None) -> tuple[int, ...]:
    """Return the place of the highest score in a grid; among equal scores, the place of the least rank.

    Args:
        scores: a tensor of any shape with one score for each point, such as the accuracy on validation images.
        rank: place -> what places of equal scores are ordered by; None: the order of the grid, first axis outermost.

    Raises:
        ValueError: the grid is empty.
    """
    if not scores.numel():
        raise ValueError("Expected a grid with at least one point but got none")
    places = [tuple(place) for place in (scores == scores.max()).nonzero().tolist()]
    return min(places, key=rank) if rank is not None else min(places)


def check_grid(path: str, scale: Sequence[Any], steps: Sequence[Any], starts: Sequence[float]) -> None:
    """Check the keys SEARCH_SCALE and SEARCH_STEP of a grid.

    Args:
        path: the path of the method's node, for messages.
        scale: upper end of each axis. steps: number of values of each axis.
        starts: where the axes begin.

    Raises:
        ValueError: an axis has no upper end above its lower one, or no number of values.
    """
    good = len(scale) == len(starts) and all(
        isinstance(end, (int, float)) and not isinstance(end, bool) and low < end < float("inf")
        for low, end in zip(starts, scale, strict=True)
    )
    if not good:
        above = ", ".join(f"{low:g}" for low in starts)
        raise ValueError(f"Expected {path}.SEARCH_SCALE to be {len(starts)} numbers, above {above}, but got {scale}")
    whole = all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in steps)
    if len(steps) != len(starts) or not whole:
        raise ValueError(f"Expected {path}.SEARCH_STEP to be {len(starts)} whole numbers above 0 but got {steps}")

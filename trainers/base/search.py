"""Choose the best point of a grid by its scores on validation images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


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

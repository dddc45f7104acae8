"""The one search of a grid on validation scores."""

import itertools

import pytest
import torch

from trainers.base.search import best_place


@pytest.mark.parametrize("seed", range(5))
def test_against_a_plain_loop(seed):
    scores = torch.randint(0, 4, (3, 4, 2), generator=torch.Generator().manual_seed(seed))
    for rank in (None, lambda place: (place[2], -place[0], place[1])):
        best = None
        for place in itertools.product(range(3), range(4), range(2)):
            score, order = int(scores[place]), place if rank is None else rank(place)
            if best is None or score > best[0] or (score == best[0] and order < best[1]):
                best = score, order, place
        assert best_place(scores, rank) == best[2]


def test_an_empty_grid():
    with pytest.raises(ValueError, match="at least one point"):
        best_place(torch.empty(0))

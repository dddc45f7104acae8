"""Parts of batches: together they are the batches of one process, and an item looks the same whoever loads it."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from dassl.data.loaders import part_of, share_of
from dassl.data.sharding import SeededItems, SharedBatches, split
from dassl.utils import distributed


@pytest.fixture
def as_rank(monkeypatch):
    """Have this process take itself for one of several."""

    def become(rank: int, ranks: int) -> None:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: ranks)

    return become


class Noise(Dataset):
    """Each item: its index, and a draw from each generator."""

    label = "noise"

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return index, random.random() + np.random.rand() + torch.rand(()).item()


@pytest.mark.parametrize("total, ranks", [(0, 2), (1, 2), (5, 2), (7, 3), (2, 4), (12, 4)])
def test_parts_differ_by_one_at_most(total, ranks):
    counts = split(total, ranks)
    assert sum(counts) == total and len(counts) == ranks
    assert max(counts) - min(counts) <= 1 and list(counts) == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    "n, size, ranks, drop", [(23, 7, 2, False), (23, 7, 3, True), (22, 7, 4, False), (3, 8, 2, True)]
)
def test_the_parts_of_all_ranks_are_the_batches_of_one(as_rank, n, size, ranks, drop):
    def order():
        return RandomSampler(range(n), generator=torch.Generator().manual_seed(4))

    whole = list(BatchSampler(order(), size, drop))
    parts = []
    for rank in range(ranks):
        as_rank(rank, ranks)
        batches = SharedBatches(order(), size, drop)
        assert len(batches) == len(whole)
        drawn = list(batches)
        shares = [batches.share(i) for i in range(len(drawn))]
        assert [share.total for share in shares] == [len(batch) for batch in whole]
        for batch, share, all_of_it in zip(drawn, shares, whole, strict=True):
            if share.size:
                assert batch == all_of_it[share.start : share.start + share.size]
            else:  # something to compute on, which counts nothing
                assert batch == all_of_it[:1] and share.weight == 0
        parts.append([batch[: share.size] for batch, share in zip(drawn, shares, strict=True)])
    assert [sum(pieces, []) for pieces in zip(*parts, strict=True)] == whole


def test_weights_make_the_mean_of_means_the_mean(as_rank):
    values = torch.arange(7.0) ** 2
    mean = 0.0
    for rank in range(3):
        as_rank(rank, 3)
        share = SharedBatches(SequentialSampler(values), 7).share(0)
        mean += share.weight * values[share.start : share.start + share.size].mean().item() / 3
    assert mean == pytest.approx(values.mean().item())


def test_an_item_looks_the_same_whoever_loads_it(as_rank):
    def epoch(seed):
        generator = torch.Generator().manual_seed(seed)
        sampler = RandomSampler(Noise(), generator=generator)
        batches = SharedBatches(sampler, 5, generator=generator)
        loader = DataLoader(SeededItems(Noise()), batch_sampler=batches, generator=generator)
        rows = []
        for number, (index, value) in enumerate(loader):
            kept = share_of(loader, number).size
            rows += list(zip(index.tolist(), value.tolist(), strict=True))[:kept]
        return rows

    as_rank(0, 1)
    alone = epoch(1)
    torch.manual_seed(9)
    parts = []
    for rank in range(2):
        as_rank(rank, 2)
        parts += epoch(1)
    assert dict(parts) == dict(alone) and len(parts) == len(alone) == 23
    assert len(set(dict(alone).values())) == 23
    as_rank(0, 1)
    assert dict(epoch(2)) != dict(alone)


def test_drawing_an_item_leaves_the_generators_alone():
    items = SeededItems(Noise())
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert items[3, 1, 0] == items[3, 1, 0] != items[3, 1, 1]
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert items.label == "noise" and items[5][0] == 5 and pickle.loads(pickle.dumps(items)).label == "noise"


def test_what_is_evaluated_is_shared_out_once(as_rank):
    loader = DataLoader(list(range(23)), batch_size=11)
    assert part_of(loader) is loader and share_of(loader, 0) is None
    seen = []
    for rank in range(2):
        as_rank(rank, 2)
        part = part_of(loader)
        for number, batch in enumerate(part):
            seen += batch.tolist()[: share_of(part, number).size]
        shuffled = DataLoader(list(range(23)), batch_size=11, shuffle=True)
        assert part_of(shuffled) is shuffled and part_of([1, 2]) == [1, 2]
    assert sorted(seen) == list(range(23))

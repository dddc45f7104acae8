"""Share batches out among the processes of a job: each takes its part of the batch that a single process would take.

A batch size in the config is that of the whole job. Sampler and order are the same in all processes; of each batch,
rank r takes a contiguous part; where the number of ranks does not divide the batch, the first ranks take one image
more. Where a batch has fewer images than there are ranks, the ranks that would get none take its first image, which
then has weight 0: every rank goes through the same number of batches, so that none waits for another in vain.

Random draws of an item (augmentation) depend on the seed, the epoch and the item's position in the epoch alone, so that
an image looks the same whichever process loads it.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from dassl.utils import distributed

__all__ = ["SeededItems", "Share", "SharedBatches"]

Key = tuple[int, int, int]  # an item's index, the seed of this pass, its position in the pass


@dataclass(frozen=True)
class Share:
    """The numbers of a batch's images that the ranks have, and which rank this one is."""

    counts: tuple[int, ...]
    rank: int

    @property
    def size(self) -> int:
        """Number of this rank's images; 0 where the rank only has a stand-in that does not count."""
        return self.counts[self.rank]

    @property
    def start(self) -> int:
        """Position of this rank's first image in the batch."""
        return sum(self.counts[: self.rank])

    @property
    def total(self) -> int:
        """Number of images in the batch."""
        return sum(self.counts)

    @property
    def weight(self) -> float:
        """Weight of a mean over this rank's images: the mean over ranks of weight * mean is the batch's mean."""
        return self.size * len(self.counts) / self.total


def split(total: int, ranks: int) -> tuple[int, ...]:
    """Divide ``total`` images among ``ranks``: the number for each rank, the first ranks with one more."""
    each, more = divmod(total, ranks)
    return tuple(each + (number < more) for number in range(ranks))


class SharedBatches(Sampler[list[Any]]):
    """A batch sampler that yields this rank's part of each batch.

    Args:
        sampler: the order of the items, the same on all ranks.
        batch_size: images in a batch of the whole job.
        drop_last: leave a smaller last batch out.
        generator: yield keys for SeededItems, whose seed is drawn from it after the order; None: plain indices.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        batch_size: int,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.generator = generator
        self._total: int | None = None  # items of the pass that was begun last
        self.of_loader = True  # whether a DataLoader goes through it, see __iter__
        self._skipped = 0

    def __len__(self) -> int:
        return self._batches(len(self.sampler))  # type: ignore[arg-type]  # ours and torch's have a length

    def _batches(self, total: int) -> int:
        return total // self.batch_size if self.drop_last else -(-total // self.batch_size)

    def skip(self, count: int) -> None:
        """Skip the next ``count`` batches, over as many passes as they take: a resumed run has seen them."""
        self._skipped = count

    def share(self, batch: int) -> Share:
        """Return the ranks' shares of batch number ``batch`` (from 0) in the pass that was begun last."""
        total = len(self.sampler) if self._total is None else self._total  # type: ignore[arg-type]
        left = total - batch * self.batch_size
        return Share(split(min(left, self.batch_size), distributed.world_size()), distributed.rank())

    def __iter__(self) -> Iterator[list[Any]]:
        if self.generator is not None and self.of_loader:
            # A loader that shared this generator would draw its workers' seed from it, in some passes only. Loaders
            # have another generator now. The draw stays, in every pass, so that a seed keeps giving the same orders.
            torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        order = list(self.sampler)
        self._total = len(order)
        keys: Sequence[Any] = order
        if self.generator is not None:
            seed = int(torch.randint(2**62, (1,), generator=self.generator))
            keys = [(index, seed, position) for position, index in enumerate(order)]
        batches = self._batches(len(order))
        skipped = min(self._skipped, batches)
        self._skipped -= skipped
        for batch in range(skipped, batches):
            first, share = batch * self.batch_size, self.share(batch)
            begin = first + share.start
            yield list(keys[begin : begin + share.size] if share.size else keys[first : first + 1])


class SeededItems(Dataset[Any]):
    """A dataset whose items' random draws depend on their key alone; other attributes are those of the dataset.

    This holds for draws from the generators of Python, NumPy and torch (on the CPU). Outside of an item these
    generators go on as if nothing had been drawn.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # a loader over items needs it

    def __getitem__(self, key: Key | int) -> Any:
        if isinstance(key, int):
            return self.dataset[key]
        index, seed, position = key
        with _seeded(seed, position):
            return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet: a copy is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


@contextlib.contextmanager
def _seeded(seed: int, position: int) -> Iterator[None]:
    words = np.random.SeedSequence([seed, position]).generate_state(3, dtype=np.uint32)
    generator = torch.default_generator  # torch.manual_seed would seed the GPUs' too
    states = random.getstate(), np.random.get_state(), generator.get_state()
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        generator.set_state(states[2])

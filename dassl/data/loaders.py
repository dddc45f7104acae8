"""Loaders with the attributes of upstream's loaders, whatever makes their batches.

Trainers written for upstream ask a loader for its ``batch_size``, ``drop_last``, ``sampler`` and ``dataset``, copy it,
make another one of its parts, and exchange the transform of its dataset. All of that must work here as in upstream,
though training batches are shared out among processes and seeded item by item (sharding.py), and though the processes
that load images are kept from epoch to epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from dassl.utils import distributed

from .sharding import SeededItems, Share, SharedBatches

__all__ = ["RunLoader", "part_of", "share_of"]


class RunLoader(DataLoader[Any]):
    """A DataLoader that can be copied and whose dataset can be changed at any time.

    Args:
        dataset: the items.
        batch_size, sampler, drop_last: as a DataLoader's, and as the loader's attributes show them.
        shared_batches: the sampler that really makes the batches: this process's part of each, with items whose random
            draws are seeded; None: batches come from batch_size, sampler and drop_last alone.
        options: the other arguments of a DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        sampler: Sampler[int],
        drop_last: bool,
        shared_batches: SharedBatches | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_size=batch_size, sampler=sampler, drop_last=drop_last, **options)
        self.shared_batches = shared_batches
        self._source: DataLoader[Any] | None = None
        self._seen: dict[str, Any] | None = None  # the dataset's attributes when its processes were started
        if shared_batches is not None:
            self._source = DataLoader(SeededItems(dataset), batch_sampler=shared_batches, **options)
            self.skip = shared_batches.skip  # batches that a resumed run has seen

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch's says which iterator
        self._notice_changes()
        return super().__iter__() if self._source is None else iter(self._source)

    def __len__(self) -> int:
        return super().__len__() if self._source is None else len(self._source)

    def _notice_changes(self) -> None:
        # Worker processes have a copy of the dataset, which does not know of a transform that was exchanged since.
        now = dict(getattr(self.dataset, "__dict__", {}))
        before, self._seen = self._seen, now
        if before is not None and (before.keys() != now.keys() or any(before[key] is not now[key] for key in now)):
            (self._source or self)._iterator = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RunLoader:
        # Upstream's loaders can be copied at any time; running worker processes cannot, so they are left out.
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        running = [loader for loader in (self, self._source) if loader is not None and loader._iterator is not None]
        kept = [loader._iterator for loader in running]
        for loader in running:
            loader._iterator = None
        try:
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        finally:
            for loader, iterator in zip(running, kept, strict=True):
                loader._iterator = iterator
        return twin


def share_of(loader: Any, batch: int) -> Share | None:
    """Return the shares of a loader's batch number ``batch``; None where each process has the whole batch."""
    batches = getattr(loader, "shared_batches", None) or getattr(loader, "batch_sampler", None)
    return batches.share(batch) if isinstance(batches, SharedBatches) else None


def part_of(loader: Any) -> Any:
    """Return a loader over this rank's parts of the batches of a loader that goes through its items in order.

    Every item is in exactly one part. Any other loader (one that remembers features, say) is returned as it is: each
    process then goes through all of it.
    """
    known = type(loader) in (DataLoader, RunLoader)
    if distributed.world_size() == 1 or not known or loader.batch_size is None:
        return loader
    if not isinstance(loader.sampler, SequentialSampler):
        return loader
    return DataLoader(
        loader.dataset,
        batch_sampler=SharedBatches(loader.sampler, loader.batch_size, loader.drop_last),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        persistent_workers=loader.persistent_workers,
    )

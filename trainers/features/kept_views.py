"""Keep training images in V fixed views, and compute the frozen part of each view once.

An epoch then costs only the adapted suffix of the encoder. View v of an image depends on seed, v and the image alone;
epoch e uses view e mod V. The part of a view's computation that does not depend on what is learnt (see `FrozenPart`) is
done when the view is first needed. Its result is kept: in RAM if the results of all views fit into a budget, else in a
memory-mapped file. That file has no name, so nothing is left of it when the process ends, however it ends.

Legend: V views, N images, B images in a batch, E width of the joint embedding.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .loaders import workers_like
from .views import SeededViews

logger = logging.getLogger(__name__)
GIB = 2**30


class FrozenPart(NamedTuple):
    """The activations of a batch of images that do not depend on what is learnt; a method keeps those that it needs.

    Attributes:
        features: features of zero-shot CLIP [B, E], fp32, normalized or not as the method wants them; None: not needed.
        hidden: what enters the first adapted block: ViT [B, N, D], ResNet [B, D, H, W]; None: no block is adapted.
    """

    features: Tensor | None = None
    hidden: Tensor | None = None


Encode = Callable[[Tensor], FrozenPart]


def mapped_rows(count: int, shape: Sequence[int], dtype: torch.dtype, folder: str) -> Tensor:
    """Return a tensor [count, *shape] in a new, nameless file in `folder`; the file goes when the tensor goes.

    Raises:
        ValueError: there is no room for the file.
    """
    size = count * math.prod(shape) * dtype.itemsize
    os.makedirs(folder, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # the mapping outlives the open file
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, but a crash at a later write
            else:
                file.truncate(size)
            buffer = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise ValueError(
            f"Expected room for {size / GIB:.1f} GiB in {folder}, for activations of INPUT.VIEWS beyond "
            f"INPUT.VIEWS_MEMORY, but got: {error}"
        ) from error
    return torch.frombuffer(buffer, dtype=dtype).view(count, *shape)


class FrozenViews:
    """The frozen parts of `count` views, put in and taken out by row.

    Args:
        count: V * N.
        budget: bytes that the frozen parts may take in RAM.
        folder: where their file lies if they take more.
    """

    def __init__(self, count: int, budget: float, folder: str) -> None:
        self.known = torch.zeros(count, dtype=torch.bool)
        self.budget = budget
        self.folder = folder
        self.features: Tensor | None = None  # [count, E]
        self.hidden: Tensor | None = None  # [count, ...]
        self.on_disk = False

    def _allocate(self, part: FrozenPart) -> None:
        """Make room for `count` rows like those of `part`."""
        count, tensors = len(self.known), [t for t in part if t is not None]
        size = count * sum(math.prod(t.shape[1:]) * t.dtype.itemsize for t in tensors)
        self.on_disk = size > self.budget
        where = f"in a file in {self.folder}" if self.on_disk else "in RAM"
        logger.info("INPUT.VIEWS: activations of %d views of training images, %.2f GiB %s", count, size / GIB, where)

        def room(values: Tensor) -> Tensor:
            shape = values.shape[1:]
            if self.on_disk:
                return mapped_rows(count, shape, values.dtype, self.folder)
            return torch.empty(count, *shape, dtype=values.dtype)  # the system commits pages as they are written to

        self.features = None if part.features is None else room(part.features)
        self.hidden = None if part.hidden is None else room(part.hidden)

    def put(self, rows: Tensor, part: FrozenPart) -> None:
        """Keep the frozen part of these rows [n]."""
        if self.features is None and self.hidden is None:
            self._allocate(part)
        if self.features is not None and part.features is not None:
            self.features[rows] = part.features.cpu()
        if self.hidden is not None and part.hidden is not None:
            self.hidden[rows] = part.hidden.cpu()
        self.known[rows] = True

    def take(self, rows: Tensor, device: torch.device) -> FrozenPart:
        """Return the frozen part of these rows [B], all of them known, on the device."""
        return self.sent(self.gather(rows, device), device)

    def gather(self, rows: Tensor, device: torch.device) -> FrozenPart:
        """Gather the frozen part of these rows [B], all of them known, in host memory; for a GPU in pinned memory."""
        assert bool(self.known[rows].all())
        kept = (self.features, self.hidden)
        return FrozenPart(*(None if values is None else _rows(values, rows, device) for values in kept))

    @staticmethod
    def sent(part: FrozenPart, device: torch.device) -> FrozenPart:
        """Copy a frozen part to the device; from pinned memory, the copy runs while the program goes on."""
        return FrozenPart(*(None if values is None else values.to(device, non_blocking=True) for values in part))


def _rows(values: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return values[rows]
    pinned = torch.empty(len(rows), *values.shape[1:], dtype=values.dtype, pin_memory=True)
    return torch.index_select(values, 0, rows, out=pinned)


class ViewLoader:
    """Hand out frozen parts of training images in batches, in the order of a loader of images.

    A batch has "label", "impath" and "index", and of "feature" and "hidden" what the frozen part
    has. Images are read and encoded only while a batch has views that are not known yet.

    Args:
        loader: a loader of the training images; its batch sampler gives the order, its dataset the augmented images.
        items: the images, with `label` and `impath`, in the dataset's order.
        encode: images [B, 3, H, W] -> their frozen part.
        views: V, at least 1.
        seed: the seed of the views, 0 or more.
        budget: bytes of RAM, see FrozenViews.
        folder: see FrozenViews.
        device: where the batches go.
    """

    def __init__(
        self,
        loader: Any,
        items: Sequence[Any],
        encode: Encode,
        views: int,
        seed: int,
        budget: float,
        folder: str,
        device: torch.device,
    ) -> None:
        self.dataset = loader.dataset
        self.batch_size = loader.batch_size
        self.batch_sampler = getattr(loader, "shared_batches", None) or loader.batch_sampler
        self.batch_sampler.of_loader = False  # no DataLoader iterates over it here, so no draw for one
        self.items = items
        self.views = views
        self.epoch = 0
        self.device = device
        self._encode = encode
        self._data = SeededViews(loader.dataset, views, seed)
        self._new_store: Callable[[], FrozenViews] = lambda: FrozenViews(len(self._data), budget, folder)
        self._options = workers_like(loader)
        self._todo: list[list[int]] = []  # the views that the reader reads next, in batches
        self.close()

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch (from 0) that the next pass belongs to."""
        self.epoch = epoch

    def close(self) -> None:
        """Forget all views, and give their memory or file back; a further pass starts anew."""
        self.store = self._new_store()
        self._reader: DataLoader[Any] | None = None

    def _read(self, batches: list[list[int]]) -> Iterator[Any]:
        """Read these views in batches; the reader's processes stay for the next epoch."""
        if not batches:
            self._reader = None  # all views of this epoch are known, so no reader is needed
            return iter(())
        if self._reader is None:
            self._reader = DataLoader(
                self._data,
                batch_sampler=self._todo,  # read anew for each pass
                persistent_workers=self._options["num_workers"] > 0,
                generator=torch.Generator(),  # for the workers: the program's own draws do not change
                **self._options,
            )
        self._todo[:] = batches
        return iter(self._reader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        offset = self.epoch % self.views * len(self.dataset)
        # The engine's own sampler gives tuples that begin with the index; upstream's sampler gives the index alone.
        batches = [[k if isinstance(k, int) else k[0] for k in batch] for batch in self.batch_sampler]
        unknown = [[offset + i for i in dict.fromkeys(batch) if not self.store.known[offset + i]] for batch in batches]
        images = self._read([rows for rows in unknown if rows])
        rows = [offset + torch.tensor(batch) for batch in batches]
        ahead: Future[FrozenPart] | None = None  # of the next batch, gathered while this one's step runs
        with ThreadPoolExecutor(1) as worker:
            for number, (batch, new) in enumerate(zip(batches, unknown, strict=True)):
                if new:
                    self.store.put(torch.tensor(new), self._encode(next(images)["img"]))
                gathered = self.store.gather(rows[number], self.device) if ahead is None else ahead.result()
                ahead = None
                if self.device.type == "cuda" and number + 1 < len(batches) and not unknown[number + 1]:
                    ahead = worker.submit(self.store.gather, rows[number + 1], self.device)
                part = self.store.sent(gathered, self.device)
                label = torch.tensor([self.items[i].label for i in batch])
                known = {"feature": part.features, "hidden": part.hidden}
                yield {
                    **{name: values for name, values in known.items() if values is not None},
                    "label": label.pin_memory() if self.device.type == "cuda" else label,
                    "impath": [self.items[i].impath for i in batch],
                    "index": torch.tensor(batch),
                }

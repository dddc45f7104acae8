"""Hand out features in batches; each image is encoded once, and cache.py keeps features between runs.

Methods that learn on features alone (probes, caches, adapters behind the encoder) take all their features from here:
those of training images in V seeded augmentations ("views"), those of validation and test images as they are. All
features are L2-normalized.

Legend: V views, N images, B images in a batch, E width of the joint embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from .encoder import Batch, Encode, FeatureSet, Slot
from .sharing import encode_all, encode_shared, is_shared, known_to_all

WORKERS: dict[str, Any] = {"num_workers": 0, "worker_init_fn": None, "pin_memory": False}


def workers_like(loader: Any) -> dict[str, Any]:
    """Return the arguments that give a new loader the same reader processes as `loader`; none if that has none."""
    return {name: getattr(loader, name, default) for name, default in WORKERS.items()}


def collect_features(loader: Iterable[Batch], encode: Encode, views: int = 1, slot: Slot | None = None) -> FeatureSet:
    """Collect the features of all images of a loader whose items are `views` times the same N images, in order.

    If the slot has the features, they come from there; else they are computed, and kept in the slot, if there is one.
    Several processes share a loader's batches out, so that all of them must call this.

    Raises:
        ValueError: the number of items is not a multiple of `views`.
    """
    known = known_to_all(slot)
    if known is not None:
        return known
    found = encode_shared(loader, encode) if is_shared(loader) else encode_all(loader, encode)
    if len(found.features) % views:
        raise ValueError(f"Expected {views} views of each image but got {len(found.features)} in all")
    n = len(found.features) // views
    known = FeatureSet(found.features.unflatten(0, (views, n)), found.labels[:n], found.paths[:n])
    if slot is not None:
        slot.save(known.values)
    return known


class FeatureLoader:
    """A loader of images that encodes them in its first pass, and remembers their features from then on.

    With a slot, the loader takes features of an earlier run from there, and keeps there those that it computes.

    In the first pass, batches have "feature" [B, E] beside all that the loader of images gives; from memory, they have
    "feature", "label", "index" and, where known, "impath" only.

    Args:
        loader: gives batches with "img", "label" and "impath", always in the same order.
        encode: images [B, 3, H, W] -> normalized features [B, E].
        slot: where the features of these images are kept between runs; None: nowhere.
    """

    def __init__(self, loader: Any, encode: Encode, slot: Slot | None = None) -> None:
        self.loader = loader
        self.dataset: Sized = getattr(loader, "dataset", ())
        self.encode = encode
        self.slot = slot
        self._known: FeatureSet | None = None
        self._batches: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.loader) if self._batches is None else len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        if self._batches is not None:
            known = self.all()
            return (_pick(known, torch.tensor(rows, device=known.labels.device)) for rows in self._batches)
        if self._known is None and not is_shared(self.loader):
            self._known = None if self.slot is None else self.slot.load()
            if self._known is None:
                return self._stream()
        return self._from_memory(self.all())

    def all(self) -> FeatureSet:
        """Return the features of all images."""
        if self._known is None:
            self._known = collect_features(self.loader, self.encode, 1, self.slot)
        return self._known

    def regroup(self, batches: list[list[int]] | None) -> None:
        """Make the batches consist of these rows (a row may be in several) from now on; None: the loader's."""
        self._batches = batches

    @torch.no_grad()
    def _stream(self) -> Iterator[Batch]:
        seen: list[Batch] = []
        for batch in self.loader:
            features = self.encode(batch["img"])
            kept = {"feature": features, "label": batch["label"], "impath": batch.get("impath", ())}
            seen.append(kept)
            yield {**batch, "feature": features}
        # This stands after the last batch: a caller that stops earlier has not seen all images.
        self._known = collect_features(seen, self.encode)
        if self.slot is not None:
            self.slot.save(self._known.values)

    def _from_memory(self, known: FeatureSet) -> Iterator[Batch]:
        size = getattr(self.loader, "batch_size", None) or len(known)
        indices, paths = torch.arange(len(known), device=known.labels.device), known.paths
        for start in range(0, len(known), size):
            rows = slice(start, start + size)  # a view, no copy
            yield _batch(known.values[0, rows], known.labels[rows], indices[rows], paths[rows])


class KnownFeatures:
    """Hand out the batches of a loader of images, with their features beside them where those are known.

    This is for methods that need the images too, and compute the features on the way. Where features are not known, a
    batch says its place: "place" = (name of the loader, number of its first image). The method gives the features to
    `keep` with that number. After a pass in which it gave those of every batch, they are in the slot.

    Args:
        loader: batches with "img", always in the same order.
        slot: where the features of these images are kept between runs.
        name: of the loader.
    """

    def __init__(self, loader: Any, slot: Slot, name: str) -> None:
        self.loader = loader
        self.dataset: Sized = loader.dataset
        self.slot = slot
        self.name = name
        self._known: FeatureSet | None = None
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.loader)

    def keep(self, start: int, features: Tensor) -> None:
        """Keep features [B, E] of the images from number `start` on."""
        self._kept[start] = features

    def __iter__(self) -> Iterator[Batch]:
        if self._known is None:
            self._known = self.slot.load()
        known, done = self._known, 0
        self._kept = {}
        for batch in self.loader:
            size = len(batch["img"])
            extra = {"place": (self.name, done)} if known is None else {"feature": known.values[0, done : done + size]}
            done += size
            yield {**batch, **extra}
        kept = [self._kept[start] for start in sorted(self._kept)]
        self._kept = {}
        if known is None and sum(map(len, kept)) == done:
            self.slot.save(torch.cat(kept)[None])


class TrainingFeatures:
    """Batches of training features in random order, which seed and epoch decide; epoch e uses view e mod V, or all.

    Args:
        compute: gives the features; called when they are first asked for.
        n: number of images.
        batch_size: B; without `drop_last` the last batch of a pass may be smaller.
        seed: the seed of the order.
        steps: batches in an epoch, taken from as many passes as needed; 0: one pass.
        every_view: V if every view counts as an image of its own, so that a pass has V * N; 0: one view per epoch.
        drop_last: whether to leave out the last, smaller batch of a pass, provided the pass has a full one.
    """

    def __init__(
        self,
        compute: Callable[[], FeatureSet],
        n: int,
        batch_size: int,
        seed: int,
        steps: int = 0,
        every_view: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.dataset = range(n * max(every_view, 1))
        self.every_view = every_view
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps
        self._used = n * max(every_view, 1)  # images of a pass
        if drop_last and self._used >= batch_size:
            self._used -= self._used % batch_size
        self.epoch = 0
        self._compute = compute
        self._known: FeatureSet | None = None
        self._skipped = 0

    def __len__(self) -> int:
        return self.steps or max(1, math.ceil(self._used / self.batch_size))

    def all(self) -> FeatureSet:
        """Return the features of all images."""
        if self._known is None:
            self._known = self._compute()
        return self._known

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch (from 0) that the next pass belongs to."""
        self.epoch = epoch

    def skip(self, count: int) -> None:
        """Skip the first `count` batches of the next pass: a resumed run has seen them."""
        self._skipped = count

    def __iter__(self) -> Iterator[Batch]:
        known = self.all()
        skipped, self._skipped = self._skipped, 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        done = 0
        while done < len(self):
            order = torch.randperm(len(self.dataset), generator=generator)[: self._used]
            views, order = order // len(known), order % len(known)  # of a whole pass at once
            device = known.labels.device
            parts = (part.split(self.batch_size) for part in (order, order.to(device), views.to(device)))
            for listed, rows, view in zip(*parts, strict=True):
                if skipped <= done < len(self):
                    yield _pick(known, rows, view if self.every_view else self.epoch % len(known.values), listed)
                done += 1


class OneStep:
    """Stand in for a loader where a method is fitted to all images at once: give one batch, of the labels alone.

    Args:
        dataset: the training images, which are only counted.
        labels: gives their labels [N].
    """

    def __init__(self, dataset: Sized, labels: Callable[[], Tensor]) -> None:
        self.dataset = dataset
        self._labels = labels

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Batch]:
        yield {"label": self._labels()}


def _pick(known: FeatureSet, rows: Tensor, view: Tensor | int = 0, listed: Tensor | None = None) -> Batch:
    """Pick these rows as a batch; `listed` are the same rows on the CPU, so that nothing waits for the device."""
    paths = [known.paths[row] for row in (rows if listed is None else listed).tolist()] if known.paths else []
    features = known.values[view, rows] if isinstance(view, Tensor) else known.values[view].index_select(0, rows)
    return _batch(features, known.labels[rows], rows, paths)


def _batch(features: Tensor, labels: Tensor, index: Tensor, paths: Sequence[str]) -> Batch:
    """Return a batch; without paths, it has no "impath"."""
    batch: Batch = {"feature": features, "label": labels, "index": index}
    return {**batch, "impath": paths} if paths else batch

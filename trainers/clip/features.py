"""Image features of a frozen CLIP, computed once and handed out in batches; feature_cache.py keeps them between runs.

Methods that learn on features alone (probes, caches, adapters behind the encoder) take everything from here: training
images in V seeded augmentations ("views"), validation and test images as they are. All features are L2-normalised.

Legend: V views, N images, B images in a batch, E width of the joint embedding.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .model import CLIP

Batch = dict[str, Any]
Encode = Callable[[Tensor], Tensor]


class ImageEncoder:
    """Images -> features of a frozen CLIP: one encoder for all trainers, so that they can share features.

    Args:
        clip: the frozen CLIP.
        precision: fp32, fp16, amp or bf16, as `autocast` and the CLIP's weights have it.
        autocast: gives the context in which images are encoded.

    Attributes:
        parts: kinds of features that lie side by side in what is returned.
        unit: whether each of them is L2-normalised.
    """

    parts = 1
    unit = True

    def __init__(self, clip: CLIP, precision: str, autocast: Callable[[], Any]) -> None:
        self.clip = clip
        self.precision = precision
        self.autocast = autocast

    @property
    def width(self) -> int:
        """Width of what is returned."""
        return self.parts * self.clip.embed_dim

    @property
    def weights_digest(self) -> str:
        """SHA-256 (hex) of all weights that features depend on."""
        return self.clip.weights_digest

    def raw(self) -> ImageEncoder:
        """Return the same encoder, whose features keep their lengths."""
        other = copy.copy(self)
        other.unit = False
        return other

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> features [B, E], L2-normalised if `unit`, fp32, on CLIP's device."""
        with self.autocast():
            features = self.clip.encode_image(images.to(self.clip.device))
        return F.normalize(features.float(), dim=-1) if self.unit else features.float()


@dataclass(frozen=True)
class FeatureSet:
    """Features of the images of one split, in the order of the split.

    Attributes:
        values: [V, N, E], normalised, fp32, on CLIP's device.
        labels: [N], there too.
        paths: the N images' files; empty where the loader does not say.
        lengths: [V, N, P] of the P parts that lie side by side in E, before they were normalised; None: not known.
    """

    values: Tensor
    labels: Tensor
    paths: Sequence[str]
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def flat(self) -> tuple[Tensor, Tensor]:
        """Every view an image of its own: features [V * N, E] and labels [V * N]."""
        return self.values.flatten(0, 1), self.labels.repeat(len(self.values))

    def normalised(self, parts: int) -> FeatureSet:
        """Return the same with each of the parts of E normalised, and their lengths."""
        split = self.values.unflatten(-1, (parts, -1))
        return FeatureSet(F.normalize(split, dim=-1).flatten(-2), self.labels, self.paths, split.norm(dim=-1))

    def mean(self) -> Tensor:
        """Return the mean over the views [N, E] of the features as they were before they were normalised."""
        if self.lengths is None:
            return self.values.mean(dim=0)
        split = self.values.unflatten(-1, (self.lengths.shape[-1], -1))
        return (split * self.lengths[..., None]).mean(dim=0).flatten(-2)


class Slot(Protocol):
    """Where features are kept between runs."""

    def load(self) -> FeatureSet | None:
        """The features, or None where they are not there."""

    def save(self, values: Tensor) -> None:
        """Keep features [V, N, E]."""


class SeededViews(Dataset[Any]):
    """V augmentations of each item of a dataset; which one depends on seed, view and item alone.

    Neither the order, nor the batch size, nor the number of reader processes changes a view. Item k is view k // N of
    item k % N.

    Args:
        dataset: N items, each augmented by random draws whenever it is read.
        views: V.
        seed: 0 or more.
    """

    def __init__(self, dataset: Any, views: int, seed: int) -> None:
        self.dataset = dataset
        self.views = views
        self.seed = seed

    def __len__(self) -> int:
        return self.views * len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        view, item = divmod(number, len(self.dataset))
        words = np.random.SeedSequence([self.seed, view, item]).generate_state(2, dtype=np.uint32)
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(words[0]))
            random.seed(int(words[0]))
            np.random.seed(int(words[1]))
            try:
                return self.dataset[item]
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])


class Mirror:
    """The mirror image of an image tensor [..., H, W]."""

    def __call__(self, image: Tensor) -> Tensor:
        return image.flip(-1)

    def __repr__(self) -> str:
        return "Mirror()"


def encode_batch(batch: Batch, encode: Encode) -> Tensor:
    """Features [B, E] of a batch: those it carries as "feature", else those of its images "img"."""
    return batch["feature"] if "feature" in batch else encode(batch["img"])


@torch.no_grad()
def collect_features(loader: Iterable[Batch], encode: Encode, views: int = 1, slot: Slot | None = None) -> FeatureSet:
    """The features of all images of a loader whose items are `views` times the same N images, in order.

    With a slot they come from there, or are kept there once computed.
    """
    known = slot.load() if slot is not None else None
    if known is not None:
        return known
    values, labels, paths = [], [], []
    for batch in loader:
        values.append(encode_batch(batch, encode))
        labels.append(batch["label"].to(values[-1].device))
        paths.extend(batch.get("impath", ()))
    features, every = torch.cat(values), torch.cat(labels)
    if len(features) % views:
        raise ValueError(f"Expected {views} views of each image but got {len(features)} in all")
    n = len(features) // views
    known = FeatureSet(features.unflatten(0, (views, n)), every[:n], paths[:n])
    if slot is not None:
        slot.save(known.values)
    return known


class FeatureLoader:
    """A loader of images that encodes them the first time it is run through, and remembers the features from then on.

    With a slot it finds features of an earlier run there, and keeps them there.

    Batches carry "feature" [B, E] beside what they had; from memory, they have "feature", "label" and "impath" only.

    Args:
        loader: batches with "img", "label" and "impath", always in the same order.
        encode: images [B, 3, H, W] -> normalised features [B, E].
        slot: where the features of these images are kept between runs, if anywhere.
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
        self._recall()
        return self._stream() if self._known is None else self._from_memory(self._known)

    def all(self) -> FeatureSet:
        """The features of all images."""
        self._recall()
        if self._known is None:
            for _ in self._stream():
                pass
        assert self._known is not None
        return self._known

    def regroup(self, batches: list[list[int]] | None) -> None:
        """From now on, the batches consist of these rows (a row may be in several); None: as the loader has them."""
        self._batches = batches

    def _recall(self) -> None:
        if self._known is None and self.slot is not None:
            self._known = self.slot.load()

    @torch.no_grad()
    def _stream(self) -> Iterator[Batch]:
        seen: list[Batch] = []
        for batch in self.loader:
            features = self.encode(batch["img"])
            kept = {"feature": features, "label": batch["label"], "impath": batch.get("impath", ())}
            seen.append(kept)
            yield {**batch, "feature": features}
        # Only here, after the last batch: whoever stops before has not seen all of them.
        self._known = collect_features(seen, self.encode)
        if self.slot is not None:
            self.slot.save(self._known.values)

    def _from_memory(self, known: FeatureSet) -> Iterator[Batch]:
        size = getattr(self.loader, "batch_size", None) or len(known)
        for start in range(0, len(known), size):
            yield _pick(known, torch.arange(start, min(start + size, len(known)), device=known.labels.device))


class KnownFeatures:
    """The batches of a loader of images, with their features beside them where those are known.

    For methods that need the images too, and compute the features on the way: where they are not known, each batch has
    a function "keep" that takes them. After a pass in which it got those of every batch, they are in the slot.

    Args:
        loader: batches with "img", always in the same order.
        slot: where the features of these images are kept between runs.
    """

    def __init__(self, loader: Any, slot: Slot) -> None:
        self.loader = loader
        self.dataset: Sized = loader.dataset
        self.slot = slot
        self._known: FeatureSet | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        if self._known is None:
            self._known = self.slot.load()
        known, done = self._known, 0
        kept: list[Tensor] = []
        for batch in self.loader:
            size = len(batch["img"])
            extra = {"keep": kept.append} if known is None else {"feature": known.values[0, done : done + size]}
            done += size
            yield {**batch, **extra}
        if known is None and sum(map(len, kept)) == done:
            self.slot.save(torch.cat(kept)[None])


class TrainingFeatures:
    """Batches of training features in random order, which seed and epoch decide; epoch e uses view e mod V, or all.

    Args:
        compute: gives the features; called when the first batch is asked for.
        n: number of images.
        batch_size: B; without `drop_last` the last batch of a pass may be smaller.
        seed: of the order.
        steps: batches in an epoch, taken from as many passes as it needs; 0: one pass.
        every_view: V where every view is an image of its own, so that a pass has V * N; 0: one view per epoch.
        drop_last: leave the last, smaller batch of a pass out, provided there is a full one.
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
        """The features of all images."""
        if self._known is None:
            self._known = self._compute()
        return self._known

    def set_epoch(self, epoch: int) -> None:
        """The epoch (from 0) that the next pass belongs to."""
        self.epoch = epoch

    def skip(self, count: int) -> None:
        """Leaves the first batches of the next pass out: a resumed run has seen them."""
        self._skipped = count

    def __iter__(self) -> Iterator[Batch]:
        known = self.all()
        skipped, self._skipped = self._skipped, 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        done = 0
        while done < len(self):
            order = torch.randperm(len(self.dataset), generator=generator)[: self._used]
            there = order.to(known.labels.device).split(self.batch_size)
            for listed, rows in zip(order.split(self.batch_size), there, strict=True):
                if skipped <= done < len(self):
                    views = rows // len(known) if self.every_view else self.epoch % len(known.values)
                    yield _pick(known, rows % len(known), views, listed % len(known))
                done += 1


class OneStep:
    """Stands in for a loader where a method is fitted in one step, to all images at once: one batch, without images."""

    def __init__(self, features: TrainingFeatures) -> None:
        self.features = features
        self.dataset = features.dataset

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Batch]:
        yield {"label": self.features.all().labels}


def _pick(known: FeatureSet, rows: Tensor, view: Tensor | int = 0, listed: Tensor | None = None) -> Batch:
    """A batch of these rows; `listed` are the same rows on the CPU, so that nothing waits for the device."""
    paths = [known.paths[row] for row in (rows if listed is None else listed).tolist()] if known.paths else []
    batch: Batch = {"feature": known.values[view, rows], "label": known.labels[rows], "index": rows}
    return {**batch, "impath": paths} if paths else batch

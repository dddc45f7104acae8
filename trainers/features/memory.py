"""Remember features while a block of code runs, so that many runs on the same images encode each image once.

Cross-validation trains on many parts of the same images. The cache on disk (cache.py) keeps whole lists of images, so
it would hold none of these parts; here each image is remembered by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .encoder import FeatureSet, ImageEncoder
from .views import SeededViews

Memory = dict[tuple[Any, ...], dict[str, Tensor]]  # what decides the features of a view -> path -> features [E]
_memory: ContextVar[tuple[Memory, bool] | None] = ContextVar("remembered_features", default=None)


@contextlib.contextmanager
def remembered_features(random_views: bool = True) -> Iterator[None]:
    """Remember the features of all images that are encoded within this block; a block within it shares its memory.

    Args:
        random_views: whether random views are remembered, too. They depend on the place of an image in its list, so
            that a run has other views, equally random ones, than it would have by itself.
    """
    outer = _memory.get()
    token = _memory.set(({} if outer is None else outer[0], random_views))
    try:
        yield
    finally:
        _memory.reset(token)


def memory_slot(encoder: ImageEncoder, loader: DataLoader[Any]) -> MemorySlot | None:
    """Return the place of a loader's images in the memory; None where they are not to be remembered."""
    found = _memory.get()
    if found is None or (isinstance(loader.dataset, SeededViews) and not found[1]):
        return None
    return MemorySlot(found[0], encoder, loader)


class MemorySlot:
    """The place in memory of the features of a loader's images. Labels and paths are those of the loader's dataset.

    A random view is remembered by its number, whatever the image's place was in the list that it was encoded with.

    Args:
        memory: what is remembered so far; it grows by `save`.
        encoder: what encodes the images.
        loader: a loader over a `DatasetWrapper`, or over `SeededViews` of one, in the order of the items.
    """

    def __init__(self, memory: Memory, encoder: ImageEncoder, loader: DataLoader[Any]) -> None:
        dataset: Any = loader.dataset
        views, seed = (dataset.views, dataset.seed) if isinstance(dataset, SeededViews) else (0, 0)
        images = dataset.dataset if views else dataset
        self.items, self.device = images.data_source, encoder.clip.device
        facts = (
            type(encoder), encoder.weights_digest, encoder.form, encoder.unit, encoder.projected, encoder.precision,
            repr(images.transform), seed,
        )  # fmt: skip
        self._known = [memory.setdefault((*facts, view), {}) for view in (range(views) if views else (-1,))]

    def load(self) -> FeatureSet | None:
        """Return the features, on CLIP's device, with the dataset's present labels; None: not all are remembered."""
        paths = [item.impath for item in self.items]
        if not all(path in known for known in self._known for path in paths):
            return None
        values = torch.stack([torch.stack([known[path] for path in paths]) for known in self._known])
        labels = torch.tensor([item.label for item in self.items], dtype=torch.long, device=self.device)
        return FeatureSet(values, labels, paths)

    def save(self, values: Tensor) -> None:
        """Remember features [V, N, E]."""
        for known, rows in zip(self._known, values, strict=True):
            known.update((item.impath, row) for item, row in zip(self.items, rows, strict=True))

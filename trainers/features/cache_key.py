"""Find the place of a loader's features in the cache on disk, and gather the facts that decide their bits.

A list of images is identified by the path and size of each file, and by the times when its content and its inode last
changed. This takes one `stat` per file, whereas digests of the content would read a whole test set from the disk before
every run. The inode's time cannot be set back, so new content with the same size and date is noticed. A dataset that
has been copied or moved misses the cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import PIL
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from dassl.data import DatasetWrapper
from dassl.utils import read_image

from ..log import DETAIL
from .cache import GIB, FeatureCache, default_folder
from .encoder import FeatureSet, ImageEncoder
from .memory import MemorySlot, memory_slot
from .views import SeededViews

logger = logging.getLogger(__name__)


class FeatureSlot:
    """The place in a cache of the features of a loader's images. Labels and paths are those of the loader's dataset.

    Args:
        cache: the cache.
        encoder: what encodes the images.
        loader: a loader over a `DatasetWrapper`, or over `SeededViews` of one, in the order of the items.
        about: "dataset", "split" and "model", for people.
    """

    def __init__(
        self, cache: FeatureCache, encoder: ImageEncoder, loader: DataLoader[Any], about: dict[str, str]
    ) -> None:
        self.cache = cache
        self.encoder = encoder
        self.about = about
        dataset: Any = loader.dataset
        self.batch_size = loader.batch_size
        self.views, self.seed = (dataset.views, dataset.seed) if isinstance(dataset, SeededViews) else (0, 0)
        self.images: Any = dataset.dataset if self.views else dataset  # the DatasetWrapper

    @cached_property
    def facts(self) -> dict[str, Any] | None:
        """Return what decides the features' bits, gathered at the first access; None where it cannot be determined."""
        clip, transform = self.encoder.clip, self.images.transform
        least = getattr(self.images, "least", 0)  # upstream Dassl's images are whole
        images, words = images_digest(item.impath for item in self.images.data_source), repr(transform)
        if images is None or " at 0x" in words:  # a memory address, which does not describe the transform
            logger.info("Features are not cached: the images are no files, or their transform cannot be described")
            return None
        steps = getattr(transform, "transforms", [transform])
        return {
            "shape": [max(1, self.views), len(self.images.data_source), self.encoder.width],
            "images": images,
            "weights": self.encoder.weights_digest,
            **({"form": self.encoder.form} if self.encoder.form else {}),
            **({} if self.encoder.unit else {"raw": True}),
            **({} if self.encoder.projected else {"before_projection": True}),  # of the same width, perhaps
            "transform": words,
            **({"least_side": least} if least else {}),
            **({"views": self.views, "seed": self.seed} if self.views else {}),
            "precision": self.encoder.precision,
            # The order in which sums are formed depends on all that follows.
            "batch_size": self.batch_size,
            "device": _device(clip.device),
            "matmul": torch.get_float32_matmul_precision(),
            "versions": [module.__version__ for module in (torch, torchvision, PIL, numpy)],
            "code": code_digest(
                read_image,
                type(self.encoder),
                self.encoder.autocast,
                type(self.images),
                *(type(step) for step in steps),
            ),
        }

    def load(self) -> FeatureSet | None:
        """Return the features from the cache, on CLIP's device, with the dataset's present labels; None: not there."""
        values = None if self.facts is None else self.cache.load(self.facts)
        if values is None:
            return None
        items, device = self.images.data_source, self.encoder.clip.device
        logger.info(
            "Features of %d %s images from the cache in %s",
            len(items),
            self.about["split"],
            self.cache.folder,
            extra=DETAIL,
        )
        labels = torch.tensor([item.label for item in items], dtype=torch.long, device=device)
        return FeatureSet(values.to(device), labels, [item.impath for item in items])

    def save(self, values: Tensor) -> None:
        """Keep features [V, N, E] that have been computed after `load` found none."""
        if self.facts is not None and list(values.shape) == self.facts["shape"]:
            self.cache.save(self.facts, values, self.about)


def feature_slot(cfg: Any, encoder: ImageEncoder, loader: Any, split: str) -> FeatureSlot | MemorySlot | None:
    """Return the slot of a loader's images; None where the cache is off, or the images have no fixed order.

    Within `remembered_features`, slots are in memory, whether the cache is on or off.

    Args:
        cfg: the configuration; FEATURE_CACHE and the names of dataset and backbone are read.
        encoder, loader: see `FeatureSlot`.
        split: "train", "val" or "test", for people.
    """
    dataset = getattr(loader, "dataset", None)
    images = dataset.dataset if isinstance(dataset, SeededViews) else dataset
    fixed = isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler)
    if not (fixed and type(images) is DatasetWrapper) or loader.batch_size is None or loader.drop_last:
        return None
    in_memory = memory_slot(encoder, loader)
    if in_memory is not None or not cfg.FEATURE_CACHE.USE:
        return in_memory
    cache = FeatureCache(
        Path(cfg.FEATURE_CACHE.DIR).expanduser().absolute() if cfg.FEATURE_CACHE.DIR else default_folder(),
        int(cfg.FEATURE_CACHE.LIMIT * GIB),
    )
    about = {"dataset": cfg.DATASET.NAME, "split": split, "model": cfg.MODEL.BACKBONE.NAME}
    return FeatureSlot(cache, encoder, loader, about)


def images_digest(paths: Iterable[str]) -> str | None:
    """Return the SHA-256 of the files' paths, sizes and times of change, in order; None if one cannot be found."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            info = os.stat(path)
        except OSError:
            return None
        line = f"{os.path.abspath(path)}\0{info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def code_digest(*things: Any) -> str:
    """Return the SHA-256 of the source files that read, transform and encode images.

    These are the modules of `things`, and all files of the packages that run the towers: clip, features and modules.
    """
    modules = {thing.__module__ for thing in things}
    files: Sequence[str | None] = [getattr(sys.modules[name], "__file__", None) for name in sorted(modules)]
    here = Path(__file__).parents[1]
    sources = [file for room in ("clip", "features", "modules") for file in sorted((here / room).glob("*.py"))]
    digest = hashlib.sha256()
    for path in (*(Path(file) for file in files if file), *sources):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, TF32 {torch.backends.cudnn.allow_tf32}"
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"

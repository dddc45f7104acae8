"""Share the encoding of a list of images out among the processes of a job, so that each image is encoded once.

Processes take whole batches in turn: an image is encoded beside the same others as by one process, and its features
have the same bits. Afterwards all processes have the features of all images.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from ..compat import processes
from .encoder import Encode, FeatureSet, Slot


class Encoded(NamedTuple):
    """Hold what was encoded: features [M, E], labels [M] on their device, and paths, where the loader gives them."""

    features: Tensor
    labels: Tensor
    paths: list[str]


def known_to_all(slot: Slot | None) -> FeatureSet | None:
    """Return the features in a slot; None where it lacks them in any process, so that all go on alike."""
    known = None if slot is None else slot.load()
    return None if slot is None or processes().any_rank(known is None) else known


def is_shared(loader: Any) -> TypeGuard[DataLoader[Any]]:
    """Return whether a loader's batches are shared out: several processes go through the same items in order."""
    return (
        processes().world_size() > 1
        and isinstance(loader, DataLoader)
        and isinstance(loader.sampler, SequentialSampler)
        and loader.batch_size is not None
        and not loader.drop_last
    )


@torch.no_grad()
def encode_all(loader: Iterable[Any], encode: Encode) -> Encoded:
    """Encode the images "img" of all batches; batches with "feature" have that taken."""
    features, labels, paths = [], [], []
    for batch in loader:
        features.append(batch["feature"] if "feature" in batch else encode(batch["img"]))
        labels.append(batch["label"].to(features[-1].device))
        paths.extend(batch.get("impath", ()))
    return Encoded(torch.cat(features), torch.cat(labels), paths)


def encode_shared(loader: DataLoader[Any], encode: Encode) -> Encoded:
    """Encode this process's batches, and return those of all processes, in the loader's order; all must call it.

    Args:
        loader: see `is_shared`.
        encode: images [B, 3, H, W] -> features [B, E].
    """
    assert loader.batch_size is not None
    batches = torch.arange(len(loader.dataset)).split(loader.batch_size)  # type: ignore[arg-type]  # it has a length
    ranks, rank = processes().world_size(), processes().rank()
    counts = [sum(map(len, batches[one::ranks])) for one in range(ranks)]
    # A process without a batch encodes the first one, which does not count: it has to know the features' shape.
    own = DataLoader(
        loader.dataset,
        batch_sampler=[batch.tolist() for batch in batches[rank::ranks] or batches[:1]],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
    )
    mine = encode_all(own, encode)
    order = torch.cat([batch for one in range(ranks) for batch in batches[one::ranks]]).argsort()
    there = order.to(mine.features.device)
    features = processes().gather_rows(mine.features, counts)[there]
    labels = processes().gather_rows(mine.labels, counts)[there]
    paths = [path for part in processes().gather_objects(mine.paths[: counts[rank]]) for path in part]
    return Encoded(features, labels, [paths[row] for row in order.tolist()] if paths else [])

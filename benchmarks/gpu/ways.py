"""The ways of making a training step that are compared: the trainer's, on images or kept views, and as published."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.session import Session
from benchmarks.measure import Stopwatch
from benchmarks.naive import Naive
from benchmarks.steps import taken_back
from dassl.engine.hooks.losses import as_numbers

CHUNK = 100  # classes at once, as published, where the activations of all do not fit


def registered(trainer: Any) -> list[tuple[Any, Any]]:
    """Return the (model, optimizer) pairs that the trainer registered."""
    return [(model, trainer._optims[name]) for name, model in trainer._models.items()]


@contextmanager
def matrix_precision(tf32: bool) -> Iterator[None]:
    """Allow or forbid TF32 in fp32 products within this context."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Fresh:
    """The trainer's `forward_backward`, and what the engine does with its numbers, on images that are on the device."""

    name = "fresh"

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        """Prepare the batch, before the clock runs."""
        device = self.trainer.device
        self.batch = {"img": images.to(device), "label": labels.to(device)}

    def step(self) -> float:
        """One step -> its loss."""
        self.trainer.guard.begin()
        loss = as_numbers(self.trainer.forward_backward(self.batch))["loss"]
        if self.trainer.guard.fault:
            raise FloatingPointError(f"Expected the step to be finite but {self.trainer.guard.fault} is not")
        return loss


class FromHost(Fresh):
    """The same on images that lie in the host's pinned memory, where a loader puts them."""

    name = "from host"

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        self.batch = {"img": images, "label": labels}


class Views(Fresh):
    """The trainer's step on kept views that are on the device."""

    name = "views"

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        part = self.trainer._frozen_part(images)
        self.batch = {"feature": part.features, "hidden": part.hidden, "label": labels.to(self.trainer.device)}


class Published:
    """The step as published, with the trainer's precision and optimizer; see `benchmarks.steps.NaiveStep`."""

    name = "published"

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.naive, self.chunk = trainer, Naive(trainer.network), 0
        (self.optim,) = [optim for optim in trainer._optims.values() if optim is not None]

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        device = self.trainer.device
        self.images, self.labels = images.to(device), labels.to(device)
        if self.chunk:
            with torch.no_grad(), self.trainer.precision.autocast():
                features = [self.naive.text_features(ids) for ids in self.naive.ids.split(self.chunk)]
            self.features = torch.cat(features).requires_grad_()

    def step(self) -> float:
        precision = self.trainer.precision
        self.optim.zero_grad()
        with precision.autocast():
            loss = self.naive.loss(self.images, self.labels, self.features if self.chunk else None)
        precision.backward(loss)
        if self.chunk:
            assert self.features.grad is not None
            grads = self.features.grad.split(self.chunk)
            for ids, grad in zip(self.naive.ids.split(self.chunk), grads, strict=True):
                with precision.autocast():
                    features = self.naive.text_features(ids)
                features.backward(grad)
        precision.update([self.optim])
        return float(loss.detach())


class Measured:
    """Hold the measurements of one way: seconds, losses and peak memory of its steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak = 0  # bytes, everything that lies in memory included
        self.before = 0  # bytes that lie in memory before a step

    def __str__(self) -> str:
        return f"{statistics.median(self.seconds):.6f} s"


def one(session: Session, way: Any, found: Measured | None) -> None:
    """One step of a way, noted in `found`; None: to warm up."""
    before = 0
    if session.cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    watch = Stopwatch(session.device)
    with watch:
        loss = way.step()
    if found is not None:
        found.seconds.append(watch.seconds)
        found.losses.append(loss)
        found.before = before
        found.peak = max(found.peak, torch.cuda.max_memory_allocated() if session.cuda else 0)


def compare(session: Session, trainer: Any, ways: Sequence[Any], batches: Sequence[Any]) -> dict[str, Measured]:
    """Each way takes the same steps from the same weights, in turning order, one step for each batch.

    The first batch warms all up. As published, classes go in chunks if all at once do not fit in memory.

    Args:
        session: the session.
        trainer: whose steps these are.
        ways: what is compared.
        batches: images and labels.
    """
    found = {way.name: Measured() for way in ways}
    for way in ways:
        for _ in range(2):
            with taken_back(registered(trainer)):
                try:
                    way.prepare(*batches[0])
                    one(session, way, None)
                except torch.cuda.OutOfMemoryError:
                    if not isinstance(way, Published) or way.chunk:
                        raise
                    way.chunk = CHUNK
                    gc.collect()
                    torch.cuda.empty_cache()
    for number, (images, labels) in enumerate(batches[1:]):
        turn = number % len(ways)
        order = [*ways[turn:], *ways[:turn]]
        for way in order[:-1]:
            with taken_back(registered(trainer)):
                way.prepare(images, labels)
                one(session, way, found[way.name])
        order[-1].prepare(images, labels)
        one(session, order[-1], found[order[-1].name])
    return found

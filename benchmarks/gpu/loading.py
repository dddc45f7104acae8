"""The part "loading": training with images from JPEG files; what the loader gives and what the step takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.session import Session
from benchmarks.gpu.steps import MODES
from benchmarks.gpu.subjects import random_batch, trainer_of, write_images
from benchmarks.gpu.ways import Fresh, FromHost, compare, matrix_precision


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _rate(session: Session, batches: Iterator[Any], step: Any, size: int, seconds: float) -> tuple[float, float]:
    """(images a second, share of the time that was spent waiting for a batch), over some seconds."""
    if session.cuda:
        torch.cuda.synchronize()
    start, waited, count = time.perf_counter(), 0.0, 0
    while count < 2 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        step(batch)
        count += 1
    if session.cuda:
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    return count * size / taken, waited / taken


def loading(session: Session) -> None:
    """Rows: images a second of the loader alone, of training through it, and of the step on images that are there."""
    mode, classes, size = "bf16", session.sizes.classes[0], session.sizes.batches[0]
    precision, tf32 = MODES[mode]
    paths = write_images(session.scratch / "images", session.sizes.files)
    seconds = 8.0 if session.cuda else 0.05
    with matrix_precision(tf32):
        trainer = trainer_of(
            session,
            "DLRCLIP",
            precision,
            classes,
            *("DATALOADER.NUM_WORKERS", session.sizes.workers),
            batch=size,
            items=session.sizes.items,
            paths=paths,
        )
        batches = _endless(trainer.train_loader_x)
        for _ in range(2):  # starts the processes
            next(batches)
        way = Fresh(trainer)

        def step(batch: Any) -> None:
            way.batch = batch
            way.step()

        about: dict[str, Any] = {"what": "loading", "mode": mode, "classes": classes, "batch": size}
        about |= {"workers": trainer.train_loader_x.num_workers, "files": "500 x 375"}
        rate, _ = _rate(session, batches, lambda batch: None, size, seconds)
        session.add(**about, part="loader", images_per_second=rate)
        for _ in range(2):
            step(next(batches))
        rate, waited = _rate(session, batches, step, size, seconds)
        session.add(**about, part="training", images_per_second=rate, waiting=waited)
        given = [random_batch(session, size, classes, seed) for seed in range(session.sizes.rounds + 1)]
        found = compare(session, trainer, [FromHost(trainer)], given)["from host"]
        session.add(**about, part="step", images_per_second=size / statistics.median(found.seconds))
        del batches

"""The part "agreement": losses of the same training steps on the CPU and on the GPU."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.session import Session
from benchmarks.gpu.subjects import random_batch, trainer_of
from benchmarks.gpu.ways import Fresh, matrix_precision
from benchmarks.measure import biggest

CPU = torch.device("cpu")
PAIRS: dict[str, tuple[Any, ...]] = {"CLIPLoRA": ("TRAINER.CLIPLORA.DROPOUT", 0.0)}  # devices draw different numbers


def losses(session: Session, name: str, device: torch.device, classes: int, batches: list[Any]) -> list[float]:
    """Losses of one step per batch, in fp32 without TF32."""
    trainer = trainer_of(session, name, "fp32", classes, *PAIRS.get(name, ()), batch=len(batches[0][1]), device=device)
    trainer.num_batches = len(batches) + 1  # no rate changes at the end of an epoch
    way = Fresh(trainer)
    found = []
    for images, labels in batches:
        way.prepare(images, labels)
        found.append(way.step())
    return found


def agreement(session: Session) -> None:
    """Rows: the losses of both devices and their largest difference; DLR-CLIP at full size, others on the tiny CLIP."""
    sizes, model, clips = session.sizes, session.model, session.clips
    with matrix_precision(False):
        for name in ("DLRCLIP", "CoOp", "CLIPLoRA", "MMA"):
            if name != "DLRCLIP":
                session.model, session.clips = "tiny" if session.cuda else model, {} if session.cuda else clips
            try:
                classes = 20 if session.cuda else sizes.classes[0]
                trainer_of(
                    session, name, "fp32", classes, device=CPU
                )  # builds the CLIP, which says how large images are
                batches = [random_batch(session, sizes.small, classes, seed) for seed in range(sizes.steps)]
                wanted = losses(session, name, CPU, classes, batches)
                got = losses(session, name, session.device, classes, batches)
                about: dict[str, Any] = {
                    "what": "agreement",
                    "trainer": name,
                    "model": session.model,
                    "batch": sizes.small,
                }
                difference = biggest(abs(a - b) for a, b in zip(got, wanted, strict=True))
                session.add(**about, difference=difference, cpu=wanted, device=got)
            finally:
                session.model, session.clips = model, clips

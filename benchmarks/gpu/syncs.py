"""The part "syncs": how often a trainer's step makes the program wait for the device, and where."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.session import Session
from benchmarks.gpu.subjects import NODES, random_batch, trainer_of
from benchmarks.gpu.ways import Fresh, FromHost, Views

ROOT = Path(__file__).resolve().parents[2]


class _Reads(TorchDispatchMode):
    """Counts the operations that turn a tensor's value into a number of the program; a GPU would make each wait."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")

    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.NAMES:
            place = _place()
            if place:
                self.places[place] += 1
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The line of this project that runs; "" where the optimizer reads its own counters, which no GPU keeps."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/optim/" in path:
            return ""
        if path.startswith(str(ROOT)) and path != __file__:
            return f"{Path(path).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


@contextmanager
def counted(device: torch.device) -> Iterator[Counter[str]]:
    """Count what makes the program wait for the device inside, by the line of the program that did.

    On a GPU torch itself tells (`torch.cuda.set_sync_debug_mode`). On the CPU, where nothing waits, the reads of single
    values are counted that would wait on a GPU.
    """
    places: Counter[str] = Counter()
    if device.type != "cuda":
        with _Reads(places):
            yield places
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in told:
        # torch warns of the switch itself, too, once in a process.
        if "synchroniz" in str(warning.message) and "prototype" not in str(warning.message):
            path = Path(warning.filename)
            where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
            places[f"{where}:{warning.lineno}"] += 1


def count_steps(step: Callable[[], Any], device: torch.device, number: int = 3) -> dict[str, float]:
    """Waits per step by place, over a few steps; the caller has warmed up."""
    with counted(device) as places:
        for _ in range(number):
            step()
    return {place: count / number for place, count in places.items()}


def syncs(session: Session) -> None:
    """Rows: for each trainer and precision the waits in a step, by place."""
    classes, batch = session.sizes.classes[0], session.sizes.batches[-1]
    for name in NODES:
        for precision in ("bf16", "amp"):
            trainer = trainer_of(session, name, precision, classes, batch=batch)
            for way in (FromHost, Views) if name == "DLRCLIP" else (FromHost,):
                found: Fresh = way(trainer)
                found.prepare(*random_batch(session, batch, classes, 1))
                for _ in range(2):
                    found.step()
                places = count_steps(found.step, session.device)
                about: dict[str, Any] = {"what": "syncs", "trainer": name, "mode": precision, "way": found.name}
                session.add(**about, waits=sum(places.values()), places=places)
    _through_loader(session, classes, batch)


def _through_loader(session: Session, classes: int, batch: int) -> None:
    """Kept views as an epoch hands them out, from the host's memory."""
    from trainers.dlrclip.network import FrozenPart

    precision = "bf16"
    items = 4 * max(batch, classes)
    trainer = trainer_of(session, "DLRCLIP", precision, classes, "INPUT.VIEWS", 1, batch=batch, items=items)
    images, _ = random_batch(session, batch, classes, 1)
    part = trainer._frozen_part(images)
    rows = torch.arange(batch)
    for start in range(0, items, batch):
        chosen = (rows + start)[: items - start]
        assert part.features is not None and part.hidden is not None
        trainer._views.store.put(chosen, FrozenPart(part.features[: len(chosen)], part.hidden[: len(chosen)]))
    batches = iter(trainer.train_loader_x)
    views = Fresh(trainer)

    def step() -> None:
        views.batch = next(batches)
        views.step()

    step()
    places = count_steps(step, session.device, 2)
    session.add(
        what="syncs", trainer="DLRCLIP", mode=precision, way="views, loader", waits=sum(places.values()), places=places
    )

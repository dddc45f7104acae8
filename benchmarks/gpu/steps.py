"""The parts on training steps: DLR-CLIP eager ("steps") and compiled ("compile"), and others' ("methods")."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.flops import fresh_step, naive_step, sizes_of, total, views_step
from benchmarks.gpu.session import Row, Session
from benchmarks.gpu.subjects import random_batch, trainer_of
from benchmarks.gpu.ways import Fresh, FromHost, Published, Views, compare, matrix_precision
from benchmarks.measure import biggest

# PREC of the trainer, and whether fp32 products may be TF32; what weights are not in half precision is in fp32.
MODES: dict[str, tuple[str, bool]] = {
    "bf16": ("bf16", True),
    "amp": ("amp", True),
    "tf32": ("fp32", True),
    "bf16 without tf32": ("bf16", False),
    "fp32": ("fp32", False),
}
COMPILING = (None, "reduce-overhead", "default")  # TRAINER.DLRCLIP.COMPILE_MODE; None: the eager step
_RATE = {"tf32": "tf32", "fp32": "fp32"}  # what share of which rate is shown beside that of bf16


def _batches(session: Session, size: int, classes: int, count: int) -> list[Any]:
    made = [random_batch(session, size, classes, seed) for seed in range(min(count, 4))]
    return [made[i % len(made)] for i in range(count)]


def _forget(session: Session) -> None:
    gc.collect()
    if session.cuda:
        torch.cuda.empty_cache()


def _counted(trainer: Any, batch: int) -> dict[str, int]:
    sizes = sizes_of(trainer.network, batch)
    fresh = total(fresh_step(sizes))
    return {
        "published": total(naive_step(sizes)),
        "fresh": fresh,
        "from host": fresh,
        "views": total(views_step(sizes)),
    }


def _rows(session: Session, mode: str, found: dict[str, Any], flops: dict[str, int], about: Row) -> None:
    medians = {name: statistics.median(measured.seconds) for name, measured in found.items()}
    rate = session.rates.get("bf16")
    for name, measured in found.items():
        row: Row = {**about, "way": name, "seconds": medians[name], "flops": flops[name], "peak": measured.peak}
        row["before"] = measured.before
        if "published" in medians:
            row["ratio"] = medians["published"] / medians[name]
            row["loss difference"] = biggest(
                abs(a - b) for a, b in zip(measured.losses, found["published"].losses, strict=True)
            )
        row["loss"] = measured.losses[-1]
        if rate:
            row["share of bf16"] = flops[name] / medians[name] / rate
        own = session.rates.get(_RATE.get(mode, ""))
        if own:
            row["share of own"] = flops[name] / medians[name] / own
        row["all seconds"] = [round(seconds, 7) for seconds in measured.seconds]
        session.add(**row)


def _cell(session: Session, mode: str, classes: int, batch: int, *pairs: Any, ways: Sequence[type] = ()) -> None:
    """One size and precision: all ways, side by side."""
    precision, tf32 = MODES[mode]
    with matrix_precision(tf32):
        trainer = trainer_of(session, "DLRCLIP", precision, classes, *pairs, batch=batch)
        batches = _batches(session, batch, classes, session.sizes.rounds + 1)
        wanted = ways or (Published, Fresh, FromHost, Views)
        found = compare(session, trainer, [way(trainer) for way in wanted], batches)
        about: Row = {"what": "step", "mode": mode, "classes": classes, "batch": batch}
        _rows(session, mode, found, _counted(trainer, batch), about)
    del trainer, found
    _forget(session)


def _order(session: Session) -> list[tuple[str, int, int]]:
    """All combinations, the most telling ones first: the time that there is decides how many are measured.

    bf16 comes first at every size, then amp, then TF32; bf16 without TF32 and plain fp32 at one size alone.
    """
    sizes = [(c, b) for b in session.sizes.batches for c in session.sizes.classes]
    common = [(mode, c, b) for mode in ("bf16", "amp", "tf32") for c, b in sizes]
    return [*common, ("bf16 without tf32", *sizes[0]), ("fp32", *sizes[0])]


def steps(session: Session) -> None:
    """Rows: each way of making DLR-CLIP's step, at each size and precision."""
    for mode, classes, batch in _order(session):
        try:
            _cell(session, mode, classes, batch)
        except torch.cuda.OutOfMemoryError as error:
            session.add(what="step", mode=mode, classes=classes, batch=batch, failed=str(error)[:300])
            _forget(session)


def compiled(session: Session) -> None:
    """Rows: the eager step, and the compiled one in each mode, on the same batches; how long compiling took."""
    mode, classes, batch = "bf16", session.sizes.classes[0], session.sizes.batches[0]
    precision, tf32 = MODES[mode]
    with matrix_precision(tf32):
        batches = _batches(session, batch, classes, session.sizes.rounds + 1)
        losses: dict[str, list[float]] = {}
        for compile in COMPILING:
            node = "TRAINER.DLRCLIP.COMPILE"
            keys = (node, True, f"{node}_MODE", compile) if compile else ()
            trainer = trainer_of(session, "DLRCLIP", precision, classes, *keys, batch=batch)
            for way in (Fresh(trainer), Views(trainer)):
                start = time.perf_counter()
                way.prepare(*batches[0])
                way.step()
                first = time.perf_counter() - start
                measured = compare(session, trainer, [way], batches)[way.name]
                seconds, flops = statistics.median(measured.seconds), _counted(trainer, batch)[way.name]
                if not compile:
                    losses[way.name] = measured.losses
                row: Row = {"what": "compile", "mode": mode, "classes": classes, "batch": batch, "way": way.name}
                row |= {"compiled": compile, "seconds": seconds, "first": first, "peak": measured.peak}
                row["loss difference"] = biggest(
                    abs(a - b) for a, b in zip(measured.losses, losses[way.name], strict=True)
                )
                if "bf16" in session.rates:
                    row["share of bf16"] = flops / seconds / session.rates["bf16"]
                session.add(**row)
            del trainer, way, measured
            _forget(session)


def methods(session: Session) -> None:
    """Rows: the steps of CoOp, CLIP-LoRA and MMA in the precision that each publishes, and in bf16.

    FLOPs are those that torch counts in a step (`FlopCounterMode`), what is computed again or for nothing included.
    """
    from torch.utils.flop_counter import FlopCounterMode

    for name, published in (("CoOp", "fp16"), ("CLIPLoRA", "amp"), ("MMA", "amp")):
        for precision in ("bf16", published):
            for classes in session.sizes.classes:
                for batch in sorted({32 if session.cuda else session.sizes.batches[0], session.sizes.batches[0]}):
                    about: Row = {"what": "method", "trainer": name, "mode": precision}
                    about |= {"classes": classes, "batch": batch}
                    try:
                        with matrix_precision(True):
                            trainer = trainer_of(session, name, precision, classes, batch=batch)
                            batches = _batches(session, batch, classes, session.sizes.rounds + 1)
                            way = FromHost(trainer)
                            measured = compare(session, trainer, [way], batches)[way.name]
                            with FlopCounterMode(display=False) as counter:
                                way.step()
                        seconds, flops = statistics.median(measured.seconds), counter.get_total_flops()
                        row: Row = {**about, "seconds": seconds, "flops": flops, "peak": measured.peak}
                        row["loss"] = measured.losses[-1]
                        if "bf16" in session.rates:
                            row["share of bf16"] = flops / seconds / session.rates["bf16"]
                        session.add(**row)
                        del trainer, way, measured, counter
                    except torch.cuda.OutOfMemoryError as error:
                        session.add(**about, failed=str(error)[:300])
                    _forget(session)

"""Classify a large folder part by part: memory does not grow, and a call that was ended goes on where it was.

A part is a file of answers for so many images, in the order in which folders are walked. Its name has its number and a
digest of all that decides its content: the images' paths, the model, and how answers are given. So a part that is there
is known to be right without being read, and processes need not talk to each other: each takes every n-th part.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dassl.evaluation.passes import progress_bar
from dassl.utils import InputError, atomic_write, distributed
from dassl.utils.packages import needed_package

from .data import files as image_files
from .prediction import Model, classify, load_model

logger = logging.getLogger(__name__)

PREFIX = "part-"
DIGITS = 12  # of the digest, in a part's name
PYARROW = "pyarrow", "--stream parquet", "parquet", " (or take --stream csv)"


def stream_program(args: argparse.Namespace) -> int:
    """Run `predict.py --stream`; return the exit code.

    Raises:
        InputError: something given was wrong.
    """
    if args.stream == "parquet":
        needed_package(*PYARROW)
    distributed.connect()
    if torch.cuda.is_available() and not args.cpu and distributed.launched():
        torch.cuda.set_device(distributed.local_rank() % torch.cuda.device_count())
    folder = Path(args.output).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Expected --output to be a folder but got {folder}: {error.strerror or error}") from error
    if next(walk(args.images), None) is None:
        raise InputError(f"Expected images in {', '.join(args.images)} but found none")
    model = load_model(args)
    began = time.monotonic()
    done, broken, skipped = stream(
        model, args.images, folder, args.stream, args.part_size, args.top_k, args.head or "",
        share=(distributed.rank(), distributed.world_size()),
    )  # fmt: skip
    seconds = time.monotonic() - began
    said = f"{done} images in {seconds:.0f} s ({done / max(seconds, 1e-9):.0f} per second)"
    print(
        f"{said}, {broken} that cannot be read (column error), {skipped} parts were there already: {folder}",
        file=sys.stderr,
    )
    distributed.stop()
    return 0


def walk(paths: Sequence[str]) -> Iterator[str]:
    """Yield the paths of all images: files as they are named, folders walked in the order of their names."""
    for path in paths:
        if os.path.isdir(path):
            yield from (os.path.join(path, name) for name in image_files.walk_images(path))
        else:
            yield path


def stream(
    model: Model,
    paths: Sequence[str],
    folder: Path,
    kind: str,
    size: int,
    top_k: int,
    head: str = "",
    share: tuple[int, int] = (0, 1),
) -> tuple[int, int, int]:
    """Write the answers for all images below `paths`, a file for each part.

    Args:
        model: a loaded model.
        paths: folders, and files.
        folder: of the parts, which is there.
        kind: parquet or csv.
        size: images of a part.
        top_k: how many classes of each image are written.
        head: which of the method's classifiers; "": the main one.
        share: this process's number, and how many there are.

    Returns:
        The numbers of images that this process has classified, of those that cannot be read, and of parts that were
        there already.
    """
    rank, processes = share
    for leftover in _mine(folder.glob(f".{PREFIX}*.tmp"), share):  # of a call that was killed while it wrote
        leftover.unlink(missing_ok=True)
    identity = model_digest(model, head, top_k, kind)
    done = broken = skipped = 0
    wanted: dict[int, str] = {}
    images = walk(paths)
    with progress_bar(desc="predict", unit="image", disable=rank > 0, leave=False) as bar:
        for number in itertools.count():
            part = list(itertools.islice(images, size))
            if not part:
                break
            name = part_name(number, identity, part, kind)
            if number % processes != rank:
                continue
            wanted[number] = name
            if (folder / name).exists():
                skipped += 1
            else:
                broken += write_part(model, part, folder / name, kind, top_k, head)
                done += len(part)
            bar.update(len(part))
    _remove_stale(folder, set(wanted.values()), share)
    return done, broken, skipped


def model_digest(model: Model, head: str, top_k: int, kind: str) -> str:
    """Return the SHA-256 (hex) of the model and of how its answers are given."""
    trainer = model.trainer
    digest = hashlib.sha256(
        f"{trainer.cfg.TRAINER.NAME} {trainer.cfg.MODEL.BACKBONE.NAME} {trainer.cfg.INPUT.dump()} {model.names} "
        f"{model.temperature} {model.threshold} {head} {top_k} {kind}".encode("utf-8", "surrogateescape")
    )
    for name in trainer.get_model_names():
        for key, value in sorted(trainer._models[name].state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def part_name(number: int, identity: str, paths: Sequence[str], kind: str) -> str:
    """Return the file name of a part."""
    words = "\0".join([identity, *paths]).encode("utf-8", "surrogateescape")
    return f"{PREFIX}{number:06d}-{hashlib.sha256(words).hexdigest()[:DIGITS]}.{kind}"


def write_part(model: Model, paths: Sequence[str], file: Path, kind: str, top_k: int, head: str) -> int:
    """Write the answers for the images of a part, whole or not at all; return how many cannot be read."""
    count = min(top_k, len(model.names))
    rows: list[list[Any]] = [[] for _ in paths]
    broken = 0
    for numbers, probabilities, bad in classify(model, paths, head, bar=False):
        values, places = probabilities.sort(dim=1, descending=True, stable=True)
        for number, best, its in zip(numbers, values[:, :count].tolist(), places[:, :count].tolist(), strict=True):
            guesses = [cell for place, p in zip(its, best, strict=True) for cell in (model.names[place], p)]
            unknown = [] if model.threshold is None else [best[0] < model.threshold]
            rows[number] = [paths[number], *guesses, *unknown, None]
        for number, reason in bad.items():
            rows[number] = [paths[number], *[None] * (2 * count + (model.threshold is not None)), reason]
        broken += len(bad)
    header = ["path", *(f"{column}_{rank}" for rank in range(1, count + 1) for column in ("class", "probability"))]
    header += [*([] if model.threshold is None else ["unknown"]), "error"]
    if kind == "csv":
        with atomic_write(file) as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)
        return broken
    arrow, parquet = (
        needed_package(*PYARROW),
        importlib.import_module("pyarrow.parquet"),
    )
    kinds = {"probability": arrow.float32(), "unknown": arrow.bool_()}
    fields = [arrow.field(name, kinds.get(name.partition("_")[0], arrow.string())) for name in header]
    table = arrow.Table.from_arrays(
        [arrow.array(column, field.type) for column, field in zip(zip(*rows, strict=True), fields, strict=True)],
        schema=arrow.schema(fields),
    )
    with atomic_write(file, "wb") as stream:
        parquet.write_table(table, stream)
    return broken


def _mine(files: Iterable[Path], share: tuple[int, int]) -> list[Path]:
    """Return those files of parts, finished or not, whose numbers are this process's."""
    rank, processes = share
    numbers = ((file, file.name.lstrip(".").removeprefix(PREFIX).partition("-")[0]) for file in files)
    return [file for file, number in numbers if number.isdecimal() and int(number) % processes == rank]


def _remove_stale(folder: Path, wanted: set[str], share: tuple[int, int]) -> None:
    """Remove this process's parts of earlier calls, with other images or another model."""
    stale = [file for file in _mine(folder.glob(f"{PREFIX}*-*.*"), share) if file.name not in wanted]
    for file in stale:
        file.unlink(missing_ok=True)
    if stale:
        logger.warning("Removed %d parts of earlier calls with other images or another model", len(stale))

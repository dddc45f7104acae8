"""One pass over a split for all heads of a trainer.

Shapes: B images in a batch, N images in the split, C classes.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dassl.data.loaders import share_of
from dassl.evaluation import HeadMetrics
from dassl.evaluation.heads import macro_f1
from dassl.utils import distributed
from dassl.utils.console import Unbroken
from dassl.utils.logger import is_quiet

from .drawing import Picture
from .mistakes import Mistake, mistakes_of, mistakes_sheet
from .predictions import Predictions, Recorder

HeadsFn = Callable[[Any], "tuple[dict[str, Tensor], Tensor]"]


@dataclass
class Example:
    """A test image with the logits that the heads gave it."""

    impath: str  # "" when the batch does not say
    image: Tensor | None  # the model's input, on the CPU
    label: int
    logits: dict[str, Tensor]  # head -> [C], on the CPU
    position: int = 0  # in the split


@dataclass
class Evaluation:
    """The results of one pass over a split, in percent."""

    split: str
    main: str = ""  # the head that counts as the method's accuracy; "": the first
    heads: dict[str, dict[str, float]] = field(default_factory=dict)
    heads_kway: dict[str, dict[str, float]] = field(default_factory=dict)  # see EvaluatingTrainer._heads_kway
    n: int | None = 0  # images; None: not known, of a test that the method brings itself
    seconds: float = 0.0
    confusion: Tensor | None = None  # [C, C] counts of the main head, rows true
    examples: list[Example] = field(default_factory=list)
    predictions: Predictions | None = None  # of a run's last test

    @functools.cached_property
    def mistakes(self) -> list[Mistake]:
        """Return the main head's mistakes, the surest first; there are none where the predictions are not kept."""
        return [] if self.predictions is None else mistakes_of(self.predictions)

    @functools.cached_property
    def mistakes_picture(self) -> Picture | None:
        """Return the surest mistakes as a picture, drawn once for all who show it; None: there are none."""
        return Picture(mistakes_sheet(self.mistakes)) if self.mistakes else None


def spread(total: int, count: int) -> set[int]:
    """Return up to ``count`` positions spread evenly over 0..total-1 (test sets are ordered by class)."""
    count = min(total, count)
    return {round(i * (total - 1) / max(count - 1, 1)) for i in range(count)}


def of_own_test(split: str, result: Any, evaluator: Any) -> Evaluation | None:
    """Return what is known of a test that a method brings itself: its result, and what its evaluator counted.

    Args:
        split: "test" or "val".
        result: accuracy in percent; None: nothing is known.
        evaluator: the trainer's evaluator; one that is not ours may keep no counts.
    """
    if not isinstance(result, int | float):
        return None
    counts = getattr(evaluator, "counts", None)
    confusion = None if counts is None else counts()
    known = {"accuracy": float(result)}
    if confusion is not None:
        known["macro_f1"] = macro_f1(confusion)
    return Evaluation(split, "main", heads={"main": known}, n=None if confusion is None else int(confusion.sum()))


def progress_bar(iterable: Any = None, **kwargs: Any) -> tqdm:
    """Return a tqdm bar on rank 0's stderr.

    A quiet run has none. If stderr is a file, the bar redraws rarely, so that a job's log stays short.
    """
    kwargs["disable"] = kwargs.get("disable", False) or not distributed.is_main() or is_quiet()
    pause = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(iterable, file=Unbroken(sys.stderr), mininterval=pause, dynamic_ncols=True, **kwargs)


def lines_above_bars() -> contextlib.AbstractContextManager[Any]:
    """Return a context for writing a line to stdout.

    If bars share the screen with the line, they are taken off meanwhile.
    """
    return tqdm.external_write_mode(file=sys.stdout) if sys.stderr.isatty() else contextlib.nullcontext()


def run_pass(
    loader: Any,
    forward: HeadsFn,
    evaluation: Evaluation,
    process: Callable[[Tensor, Tensor], None],
    num_examples: int = 0,
    keep_bar: bool = True,
    recorder: Recorder | None = None,
) -> None:
    """Fill ``evaluation`` from one pass.

    If the loader gives each process a part of every batch, the logits are gathered, so that each process sees all of
    them in the order of the split. Every count and every choice is then, on all ranks, what one process alone has.

    Args:
        loader: batches; a dict may say ``impath``.
        forward: batch -> (head name -> logits [B, C], labels [B]).
        evaluation: its ``split`` and ``main`` are read, the rest is filled in.
        process: called with the main head's logits and the labels of each batch.
        num_examples: how many images to keep, spread over the split.
        keep_bar: leave the progress bar on the screen at the end.
        recorder: takes all logits, and what ``forward`` told it of the batch.
    """
    metrics: dict[str, HeadMetrics] = {}
    start = time.perf_counter()
    wanted = spread(_length(loader), num_examples)
    for number, batch in enumerate(progress_bar(loader, desc=evaluation.split, unit="batch", leave=keep_bar)):
        heads, labels = forward(batch)
        evaluation.main = evaluation.main or next(iter(heads))
        if evaluation.main not in heads:
            raise ValueError(f'Expected main_head to be one of {", ".join(heads)} but got "{evaluation.main}"')
        share = share_of(loader, number)
        offset = (evaluation.n or 0) + (share.start if share else 0)
        rows = share.size if share else len(labels)
        evaluation.examples.extend(_examples(batch, heads, labels[:rows], offset, wanted))
        if share:
            labels = distributed.gather_rows(labels, share.counts)
            heads = {name: distributed.gather_rows(logits, share.counts) for name, logits in heads.items()}
        if recorder is not None:
            recorder.add(heads, labels, share)
        process(heads[evaluation.main], labels)
        for name, logits in heads.items():
            if name not in metrics:
                metrics[name] = HeadMetrics(logits.shape[1], logits.device)
            metrics[name].update(logits, labels)
        evaluation.n = (evaluation.n or 0) + len(labels)
    if wanted and share_of(loader, 0):
        parts = distributed.gather_objects(evaluation.examples)
        evaluation.examples = sorted((x for part in parts for x in part), key=lambda example: example.position)
    if metrics:
        evaluation.heads = {name: metric.compute() for name, metric in metrics.items()}
        evaluation.confusion = metrics[evaluation.main].confusion()
    evaluation.seconds = time.perf_counter() - start


def _length(loader: Any) -> int:
    """Return N if the loader knows it, else 0 (then no examples are kept)."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return 0


def _examples(
    batch: Any, heads: Mapping[str, Tensor], labels: Tensor, offset: int, wanted: set[int]
) -> Iterator[Example]:
    fields = batch if isinstance(batch, Mapping) else {}
    paths, images = fields.get("impath"), fields.get("img")
    for row in range(len(labels)):
        if offset + row in wanted:
            yield Example(
                impath=str(paths[row]) if paths is not None else "",
                image=images[row].detach().float().cpu() if isinstance(images, Tensor) else None,
                label=int(labels[row]),
                logits={name: logits[row].detach().float().cpu() for name, logits in heads.items()},
                position=offset + row,
            )


def as_heads(output: Any) -> dict[str, Tensor]:
    """Return the heads of a trainer's output: a dict as it is, one tensor of logits as the head "main"."""
    if isinstance(output, Mapping):
        return dict(output)
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"Expected model_inference to return logits [B, C] but got {type(output).__name__}")
    return {"main": output}

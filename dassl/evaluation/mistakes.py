"""List the images of a split that a head classifies wrongly, and show the surest of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dassl.utils import InputError, one_line, read_image
from dassl.utils.files import write_csv

from .predictions import Predictions
from .sheet import Bar, Tile, draw_sheet

MISTAKES, EVAL_MISTAKES = "mistakes.csv", "mistakes-eval.csv"  # in the folder of a run; the sheet is a PNG beside it
SHOWN = 24  # mistakes on a sheet
COLUMNS = 3
HEADER = ("path", "true", "predicted", "probability", "probability_of_true")


class Mistake(NamedTuple):
    """An image that is classified wrongly.

    Attributes:
        position: in the split.
        path: of the image; "": the predictions do not say.
        true, predicted: class names.
        probability: of the predicted class, 0 to 1.
        probability_of_true: of the true class.
    """

    position: int
    path: str
    true: str
    predicted: str
    probability: float
    probability_of_true: float


class ClassResult(NamedTuple):
    """The result of one class: how many of its images are classified correctly.

    Attributes:
        name: of the class.
        total, correct: its images, and those that are classified correctly.
        rival: the class that most of the others are taken for; "": there is none.
        to_rival: how many these are.
    """

    name: str
    total: int
    correct: int
    rival: str
    to_rival: int

    def __str__(self) -> str:
        taken = f", {self.to_rival} taken for {one_line(self.rival, 40)}" if self.rival else ""
        return f"{one_line(self.name, 40)} ({self.correct} of {self.total} correct{taken})"


def mistakes_of(predictions: Predictions, head: str = "") -> list[Mistake]:
    """Return the mistakes of a head, the surest first.

    Args:
        predictions: of a split.
        head: "": the main one.

    Raises:
        InputError: there is no such head.
    """
    row = predictions.head(head or predictions.main)
    names, predicted = predictions.classnames, predictions.top[row, :, 0]
    wrong = np.flatnonzero(predicted != predictions.labels)
    total = predictions.logsumexp[row, wrong]
    # Of a wrong answer, the strongest class other than the true one is the predicted one.
    surest, true = np.exp(predictions.rival[row, wrong] - total), np.exp(predictions.true[row, wrong] - total)
    return [
        Mistake(
            int(wrong[i]),
            predictions.paths[wrong[i]] if predictions.paths else "",
            names[predictions.labels[wrong[i]]],
            names[predicted[wrong[i]]],
            float(surest[i]),
            float(true[i]),
        )
        for i in np.argsort(-surest, kind="stable")
    ]


def class_results(predictions: Predictions, head: str = "") -> list[ClassResult]:
    """Return the result of each class that occurs, the worst first; classes that are level keep their order.

    Args:
        predictions: of a split.
        head: "": the main one.

    Raises:
        InputError: there is no such head.
    """
    counts, names = predictions.confusion(head or predictions.main), predictions.classnames
    results = []
    for label in np.flatnonzero(counts.sum(1)):
        others = counts[label].copy()
        others[label] = 0
        rival = int(others.argmax())
        found = (names[rival], int(others[rival])) if others[rival] else ("", 0)
        results.append(ClassResult(names[label], int(counts[label].sum()), int(counts[label, label]), *found))
    return sorted(results, key=lambda result: result.correct / result.total)


def write_mistakes(path: Path, mistakes: Sequence[Mistake]) -> None:
    """Write all mistakes to a CSV file with the columns of HEADER; without a path an image is "#" and its position."""
    rows = [
        (
            mistake.path or f"#{mistake.position}",
            mistake.true,
            mistake.predicted,
            f"{mistake.probability:.6f}",
            f"{mistake.probability_of_true:.6f}",
        )
        for mistake in mistakes
    ]
    write_csv(path, [HEADER, *rows])


def mistakes_sheet(mistakes: Sequence[Mistake], shown: int = SHOWN) -> np.ndarray:
    """Draw the first mistakes with the true and the predicted class.

    Args:
        mistakes: at least one.
        shown: how many are drawn.

    Returns:
        uint8 [H, W, 3]. An image that cannot be read, or whose path is not known, is a gray square.
    """
    return draw_sheet(list(_tiles(mistakes[:shown])), COLUMNS)


def _tiles(mistakes: Sequence[Mistake]) -> Iterator[Tile]:
    for mistake in mistakes:
        true, predicted = one_line(mistake.true, 40), one_line(mistake.predicted, 40)
        bars = [Bar(predicted, mistake.probability, False), Bar(true, mistake.probability_of_true, True)]
        place = one_line("/".join(Path(mistake.path).parts[-2:]), 60) if mistake.path else f"image {mistake.position}"
        yield Tile(functools.partial(read_or_none, mistake.path), place, [(f"{true}, taken for", bars)])


def read_or_none(path: str) -> Image.Image | None:
    """Return the image at `path`; None: it cannot be read."""
    try:
        return read_image(path) if path else None
    except InputError:
        return None

"""Pictures of an evaluation, as uint8 arrays [H, W, 3]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from dassl.utils import InputError, one_line, read_image

from .passes import Example

MAX_NAMED_CLASSES = 40  # more names than this cannot be read beside a matrix
MAX_COUNTED_CLASSES = 15  # more numbers than this cannot be read inside its cells


# Class names are no formulae: a single "$" in one would otherwise end a run.
_plain_text = matplotlib.rc_context({"text.parse_math": False})


def _name(names: Mapping[int, str], label: int) -> str:
    return one_line(names.get(label, str(label)), 40)


def _render(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)  # drawn without pyplot: no window system, no global list of figures
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@_plain_text
def confusion_image(counts: Tensor, names: Mapping[int, str], title: str = "") -> np.ndarray:
    """Draw the confusion matrix, each row as shares of its true class.

    Args:
        counts: [C, C], rows true, columns predicted.
        names: label -> class name.
        title: above the picture.
    """
    matrix = counts.double()
    shares = (matrix / matrix.sum(1, keepdim=True).clamp(min=1)).numpy()
    classes = len(shares)
    side = min(max(4.0, 0.32 * min(classes, MAX_NAMED_CLASSES) + 2.0), 14.0)  # inches
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(drawn, ax=axes, fraction=0.046, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if classes <= MAX_NAMED_CLASSES:
        labels = [_name(names, i) for i in range(classes)]
        axes.set_xticks(range(classes), labels, rotation=90, fontsize=8)
        axes.set_yticks(range(classes), labels, fontsize=8)
    if classes <= MAX_COUNTED_CLASSES:
        for row, column in np.ndindex(classes, classes):
            dark = shares[row, column] > 0.5
            text = str(int(counts[row, column]))
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    return _render(figure)


@_plain_text
def examples_image(
    examples: Sequence[Example], names: Mapping[int, str], after: str, before: str = "", top: int = 5
) -> np.ndarray:
    """Draw test images with the likeliest classes of a head, and those of the head it is compared with.

    Args:
        examples: at most a dozen.
        names: label -> class name.
        after: the head that counts.
        before: the head to compare with; it is left out if it is "" or the examples lack it.
        top: how many classes to show.
    """
    shown = [head for head in (before, after) if head and all(head in e.logits for e in examples)]
    figure = Figure(figsize=(2.2 + 2.8 * len(shown), 1.5 * len(examples)), dpi=100, layout="constrained")
    grid = figure.subplots(len(examples), 1 + len(shown), squeeze=False, width_ratios=[1.0] + [1.6] * len(shown))
    for row, example in enumerate(examples):
        _draw_picture(grid[row, 0], example)
        grid[row, 0].set_title(_name(names, example.label), fontsize=9)
        for column, head in enumerate(shown, start=1):
            _draw_bars(grid[row, column], example, head, names, top)
            if row == 0:
                when = "before" if head == before and before != after else "after"
                grid[row, column].set_title(f"{when} ({head})" if len(shown) > 1 else head, fontsize=9)
    return _render(figure)


def _draw_picture(axes: Any, example: Example) -> None:
    axes.axis("off")
    try:
        if example.impath:
            axes.imshow(read_image(example.impath))
            return
    except InputError:
        pass  # a picture of the model's input does as well
    if example.image is not None and example.image.ndim == 3 and example.image.shape[0] == 3:
        low, high = example.image.min(), example.image.max()  # the input is normalized: stretch it back to 0..1
        axes.imshow(((example.image - low) / (high - low).clamp(min=1e-8)).permute(1, 2, 0).numpy())


def _draw_bars(axes: Any, example: Example, head: str, names: Mapping[int, str], top: int) -> None:
    probabilities = example.logits[head].softmax(0)
    values, labels = probabilities.topk(min(top, len(probabilities)))
    colors = ["tab:green" if label == example.label else "tab:gray" for label in labels.tolist()]
    places = list(range(len(values)))
    axes.barh(places, values.numpy(), color=colors)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_yticks(places, [_name(names, label) for label in labels.tolist()], fontsize=7)
    axes.tick_params(axis="x", labelsize=6)

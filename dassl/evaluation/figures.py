"""Pictures of an evaluation, as uint8 arrays [H, W, 3]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dassl.utils import one_line

from .mistakes import read_or_none
from .passes import Example
from .sheet import Bar, Tile, draw_sheet

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
    labels = [_name(names, i) for i in range(classes)] if classes <= MAX_NAMED_CLASSES else []
    # Inches. Room for the names is reckoned, not measured: matplotlib's own layouts take longer than all the rest.
    side, margin = min(max(2.5, 0.3 * classes), 12.0), 0.7 + 0.075 * max(map(len, labels), default=3)
    width, height = margin + side + 1.0, margin + side + 0.4
    figure = Figure(figsize=(width, height), dpi=100)
    axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
    drawn = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    bar = figure.add_axes(((margin + side + 0.15) / width, margin / height, 0.15 / width, side / height))
    figure.colorbar(drawn, cax=bar, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if labels:
        axes.set_xticks(range(classes), labels, rotation=90, fontsize=8)
        axes.set_yticks(range(classes), labels, fontsize=8)
    if classes <= MAX_COUNTED_CLASSES:
        for row, column in np.ndindex(classes, classes):
            dark = shares[row, column] > 0.5
            text = str(int(counts[row, column]))
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    return _render(figure)


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
    shown = [head for head in dict.fromkeys((before, after)) if head and all(head in e.logits for e in examples)]
    when = dict.fromkeys(shown, "") if len(shown) == 1 else {before: "before: ", after: "after: "}

    def bars(example: Example, head: str) -> list[Bar]:
        values, labels = example.logits[head].softmax(0).topk(min(top, len(example.logits[head])))
        pairs = zip(values.tolist(), labels.tolist(), strict=True)
        return [Bar(_name(names, label), value, label == example.label) for value, label in pairs]

    return draw_sheet(
        [
            Tile(
                partial(_picture, e), _name(names, e.label), [(f"{when[head]}{head}", bars(e, head)) for head in shown]
            )
            for e in examples
        ]
    )


def _picture(example: Example) -> Image.Image | None:
    """Return the image of an example, or what the model was given of it; None: there is no picture."""
    picture = read_or_none(example.impath)
    if picture is None and example.image is not None and example.image.ndim == 3 and example.image.shape[0] == 3:
        low, high = example.image.min(), example.image.max()  # the input is normalized: stretch it back to 0..255
        pixels = 255 * (example.image - low) / (high - low).clamp(min=1e-8)
        picture = Image.fromarray(pixels.permute(1, 2, 0).byte().numpy())
    return picture

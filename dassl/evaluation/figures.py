"""Pictures of an evaluation, as uint8 arrays [H, W, 3]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from PIL import Image

from .matrix import class_name, confusion_image
from .mistakes import read_or_none
from .passes import Example
from .sheet import Bar, Tile, draw_sheet

__all__ = ["confusion_image", "examples_image"]


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
        return [Bar(class_name(names, label), value, label == example.label) for value, label in pairs]

    return draw_sheet(
        [
            Tile(
                partial(_picture, e),
                class_name(names, e.label),
                [(f"{when[head]}{head}", bars(e, head)) for head in shown],
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

"""Draw a confusion matrix with Pillow, in a tenth of matplotlib's time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from dassl.utils import one_line

from .drawing import BACKGROUND, FONT, TEXT, draw_upwards, fitting, font

MAX_NAMED_CLASSES = 40  # more names than this cannot be read beside a matrix
MAX_COUNTED_CLASSES = 15  # more numbers than this cannot be read inside its cells

CELL, COUNTED_CELL = 20, 30  # pixels: side of a cell that has a name, and of one with a number inside
MIN_SIDE, MAX_SIDE = 250, 1200  # of the matrix
COUNT, LABEL, TITLE = 10, 14, 17  # sizes of fonts; names have the size FONT
TICK, GAP, PAD, BAR = 4, 6, 12, 15
FRAME = (0, 0, 0)

# ColorBrewer's Blues, from 0 to 1 in equal steps, filled up to 256 colors.
_ANCHORS = np.array(
    [
        (247, 251, 255),
        (222, 235, 247),
        (198, 219, 239),
        (158, 202, 225),
        (107, 174, 214),
        (66, 146, 198),
        (33, 113, 181),
        (8, 81, 156),
        (8, 48, 107),
    ]
)
_STEPS = np.linspace(0, len(_ANCHORS) - 1, 256)
BLUES = np.stack([np.interp(_STEPS, np.arange(len(_ANCHORS)), _ANCHORS[:, i]) for i in range(3)], 1).round()
BLUES = BLUES.astype(np.uint8)  # [256, 3]


def class_name(names: Mapping[int, str], label: int) -> str:
    """Return what a picture calls a class: its name as one short line, or the number of a class without a name."""
    return one_line(names.get(label, str(label)), 40)


def confusion_image(counts: Tensor, names: Mapping[int, str], title: str = "") -> np.ndarray:
    """Draw the confusion matrix, each row as shares of its true class.

    Args:
        counts: [C, C], rows true, columns predicted.
        names: label -> class name.
        title: above the picture.

    Returns:
        uint8 [H, W, 3].
    """
    matrix = counts.double()
    shares = (matrix / matrix.sum(1, keepdim=True).clamp(min=1)).numpy()
    classes = len(shares)
    shown = counts.long().tolist() if classes <= MAX_COUNTED_CLASSES else []
    numbers = [[str(count) for count in row] for row in shown]
    widest = max((round(font(COUNT).getlength(number)) + 4 for row in numbers for number in row), default=0)
    side = max(MIN_SIDE, classes * max(CELL, widest), min(classes, MAX_COUNTED_CLASSES) * COUNTED_CELL)
    side = min(side, MAX_SIDE)
    side = side // classes * classes or side  # all cells have one size, as long as each has a pixel
    named = classes <= MAX_NAMED_CLASSES
    if named:
        labels = {i: class_name(names, i) for i in range(classes)}
    else:
        labels = {i: str(i) for i in range(0, classes, _step(classes))}
    longest = max(round(font().getlength(label)) for label in labels.values())
    room, below = longest + TICK + GAP, (longest if named else FONT) + TICK + GAP
    left, top = PAD + LABEL + GAP + room, PAD + TITLE + GAP + PAD
    bar = left + side + PAD
    scale = BAR + TICK + GAP + round(font().getlength("0.0"))
    width, height = bar + scale + GAP + LABEL + PAD, top + side + below + LABEL + GAP + PAD

    image = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((width / 2, PAD), fitting(one_line(title, 200), width - 2 * PAD, TITLE), TEXT, font(TITLE), anchor="ma")
    place = np.arange(side) * classes // side  # the class of each pixel
    _paste(image, left, top, BLUES[(255 * shares).round().astype(int)][place][:, place])
    for label, name in labels.items():
        middle = (label + 0.5) * side / classes
        _tick(draw, left - 1, top + middle, -TICK)
        draw.text((left - TICK - GAP, top + middle), name, TEXT, font(), anchor="rm")
        draw.line((left + middle, top + side + 1, left + middle, top + side + TICK), FRAME)
        if named:
            draw_upwards(image, left + middle, top + side + TICK + GAP, name)
        else:
            draw.text((left + middle, top + side + TICK + GAP), name, TEXT, font(), anchor="mt")
    for row, column in np.ndindex(len(numbers), len(numbers)):
        x, y = ((number + 0.5) * side / classes for number in (column, row))
        color = BACKGROUND if shares[row, column] > 0.5 else TEXT  # the upper half of the colors is dark
        draw.text((left + x, top + y), numbers[row][column], color, font(COUNT), anchor="mm")
    draw.text((left + side / 2, height - PAD), "predicted", TEXT, font(LABEL), anchor="md")
    draw_upwards(image, PAD + LABEL / 2, top + side / 2, "true", LABEL, anchor="m")
    _draw_scale(image, bar, top, side)
    draw_upwards(image, width - PAD - LABEL / 2, top + side / 2, "share of the true class", LABEL, anchor="m")
    return np.asarray(image)


def _step(classes: int) -> int:
    """Return 1, 2 or 5 times a power of ten: which classes have their number written, ten at most."""
    power = 10 ** (len(str(classes)) - 2)
    return next(factor * power for factor in (1, 2, 5, 10) if classes <= 10 * factor * power)


def _draw_scale(image: Image.Image, left: int, top: int, height: int) -> None:
    """Draw the bar of colors from 1 down to 0, with their numbers."""
    draw = ImageDraw.Draw(image)
    _paste(image, left, top, np.repeat(BLUES[np.linspace(255, 0, height).round().astype(int)][:, None], BAR, 1))
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1):
        y = top + (1 - share) * (height - 1)
        _tick(draw, left + BAR, y, TICK)
        draw.text((left + BAR + TICK + GAP, y), f"{share:.1f}", TEXT, font(), anchor="lm")


def _paste(image: Image.Image, left: int, top: int, pixels: np.ndarray) -> None:
    """Draw pixels into the image, with a frame around them."""
    height, width = pixels.shape[:2]
    image.paste(Image.fromarray(pixels), (left, top))
    ImageDraw.Draw(image).rectangle((left - 1, top - 1, left + width, top + height), outline=FRAME)


def _tick(draw: ImageDraw.ImageDraw, x: float, y: float, length: float) -> None:
    draw.line((x, y, x + length, y), FRAME)

"""Draw many images and what a model says of them as one picture; Pillow does it in a tenth of matplotlib's time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .drawing import BACKGROUND, TEXT, fitting, font

THUMB = 96  # pixels: side of the square that holds an image
BARS = 190  # width of a block of bars
LINE = 15
PAD = 8
TRUE_COLOR, OTHER_COLOR = (123, 201, 171), (200, 204, 212)
EMPTY = (238, 238, 238)


class Bar(NamedTuple):
    """A class and its probability.

    Attributes:
        name: of the class.
        share: 0 to 1.
        right: whether it is the true class, which has a color of its own.
    """

    name: str
    share: float
    right: bool


class Tile(NamedTuple):
    """An image and what is said of it.

    Attributes:
        picture: returns the image; None: it cannot be shown. It is called when the tile is drawn, and not kept.
        title: the line above it.
        blocks: for each head (heading, bars).
    """

    picture: Callable[[], Image.Image | None]
    title: str
    blocks: Sequence[tuple[str, Sequence[Bar]]]


def draw_sheet(tiles: Sequence[Tile], columns: int = 1) -> np.ndarray:
    """Draw tiles in rows, from left to right.

    Args:
        tiles: at least one.
        columns: how many stand beside each other.

    Returns:
        uint8 [H, W, 3].
    """
    columns = max(1, min(columns, len(tiles)))
    blocks = max(len(tile.blocks) for tile in tiles)
    lines = max((len(bars) for tile in tiles for _, bars in tile.blocks), default=0)
    width = PAD + THUMB + blocks * (PAD + BARS) + PAD
    height = PAD + LINE + max(THUMB, (1 + lines) * LINE) + PAD
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, tile in enumerate(tiles):
        left, top = number % columns * width + PAD, number // columns * height + PAD
        draw.text((left, top), fitting(tile.title, width - 2 * PAD), TEXT, font())
        top += LINE
        _paste(sheet, tile.picture(), left, top)
        for place, (heading, bars) in enumerate(tile.blocks):
            _draw_block(draw, left + THUMB + PAD + place * (BARS + PAD), top, heading, bars)
    return np.asarray(sheet)


def _paste(sheet: Image.Image, picture: Image.Image | None, left: int, top: int) -> None:
    frame = Image.new("RGB", (THUMB, THUMB), EMPTY)
    if picture is not None:
        picture = picture.convert("RGB")
        scale = THUMB / max(picture.size)  # small pictures are enlarged, so that all are seen alike
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.NEAREST)
        frame.paste(picture, ((THUMB - size[0]) // 2, (THUMB - size[1]) // 2))
    else:
        ImageDraw.Draw(frame).text((THUMB / 2, THUMB / 2), "no picture", TEXT, font(), anchor="mm")
    sheet.paste(frame, (left, top))


def _draw_block(draw: ImageDraw.ImageDraw, left: int, top: int, heading: str, bars: Sequence[Bar]) -> None:
    draw.text((left, top), fitting(heading, BARS), TEXT, font())
    for row, bar in enumerate(bars, start=1):
        y = top + row * LINE
        color = TRUE_COLOR if bar.right else OTHER_COLOR
        draw.rectangle((left, y, left + max(1, round(BARS * bar.share)), y + LINE - 3), color)
        share = f"{100 * bar.share:.0f} %"
        room = BARS - font().getlength(share) - 10
        draw.text((left + 3, y - 1), fitting(bar.name, room), TEXT, font())
        draw.text((left + BARS, y - 1), share, TEXT, font(), anchor="ra")

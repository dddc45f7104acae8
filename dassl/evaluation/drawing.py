"""Fonts, text that fits and PNG files: what the pictures drawn with Pillow share."""

from __future__ import annotations

import bisect
import functools
import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = 11  # pixels
BACKGROUND, TEXT = (255, 255, 255), (26, 26, 26)


@dataclass(frozen=True)
class Picture:
    """A picture and its PNG file, which is made once for all who want it.

    Attributes:
        pixels: uint8 [H, W, 3].
    """

    pixels: np.ndarray

    @functools.cached_property
    def png(self) -> bytes:
        """Return the content of the PNG file."""
        stream = io.BytesIO()
        # Pillow's own level, 6, takes twice as long for a file that is a tenth smaller.
        Image.fromarray(self.pixels).save(stream, "PNG", compress_level=1)
        return stream.getvalue()


@functools.cache
def font(size: int = FONT) -> ImageFont.FreeTypeFont:
    """Return the font of the figures of scripts/ in a size in pixels; it has more alphabets than Pillow's own."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def fitting(text: str, width: float, size: int = FONT) -> str:
    """Return the text, or as much of its beginning as fits with an ellipsis into `width` pixels."""
    measure = font(size).getlength
    if measure(text) <= width:
        return text
    kept = bisect.bisect_right(range(len(text)), width, key=lambda length: measure(f"{text[:length]}…")) - 1
    return f"{text[: max(kept, 0)]}…"


def draw_upwards(image: Image.Image, x: float, y: float, text: str, size: int = FONT, anchor: str = "t") -> None:
    """Draw a line of text that reads from the bottom to the top.

    Args:
        image: is drawn on.
        x: of the middle of the line.
        y: of its end ("t"), or of its middle ("m").
        text: one line.
        size: of the font.
        anchor: what `y` means.
    """
    length, height = round(font(size).getlength(text)), sum(font(size).getmetrics())
    line = Image.new("L", (length + 2, height))
    ImageDraw.Draw(line).text((1, height / 2), text, 255, font(size), anchor="lm")
    line = line.transpose(Image.Transpose.ROTATE_90)
    top = y if anchor == "t" else y - line.height / 2
    image.paste(TEXT, (round(x - line.width / 2), round(top)), line)

"""Digits and letters drawn with the fonts that Matplotlib carries, slanted and distorted by a generator."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # without I and O, which are the digits one and zero in most fonts
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Italic",
    "DejaVuSansMono",
    "cmr10",
    "STIXGeneral",
)


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def glyph_mask(character: str, rng: np.random.Generator, size: int = 64, coarse: float = 0.5) -> np.ndarray:
    """Draw one character with a random font, size, slant, bend and stroke weight.

    Args:
        character: one character.
        rng: source of all variation.
        size: side in pixels.
        coarse: probability that the glyph passes through an 8-pixel raster, as scanned digits do.

    Returns:
        float32 mask [size, size] in [0, 1].
    """
    font = _font(FONTS[rng.integers(len(FONTS))], int(rng.integers(int(0.7 * size), int(1.1 * size))))
    image = Image.new("L", (size, size))
    draw = ImageDraw.Draw(image)
    draw.text(
        (size / 2, size / 2),
        character,
        fill=255,
        font=font,
        anchor="mm",
        stroke_width=int(rng.integers(0, max(2, size // 16))),
    )
    # An affine slant and a sine bend per axis: enough to leave the type-setter's straight lines.
    shear, turn = rng.uniform(-0.35, 0.35), np.deg2rad(rng.uniform(-15, 15))
    sx, sy = rng.uniform(0.9, 1.35), rng.uniform(0.8, 1.1)
    y, x = np.mgrid[0:size, 0:size] / (size / 2) - 1.0
    u = (np.cos(turn) * x + np.sin(turn) * y) * sx + shear * y
    v = (-np.sin(turn) * x + np.cos(turn) * y) * sy
    u = u + rng.uniform(0, 0.1) * np.sin(v * rng.uniform(2, 4) + rng.uniform(0, 6.3)) + rng.uniform(-0.1, 0.1)
    v = v + rng.uniform(0, 0.1) * np.sin(u * rng.uniform(2, 4) + rng.uniform(0, 6.3)) + rng.uniform(-0.1, 0.1)
    columns = np.clip(((u + 1) * size / 2).round().astype(int), 0, size - 1)
    rows = np.clip(((v + 1) * size / 2).round().astype(int), 0, size - 1)
    mask = np.asarray(image)[rows, columns]
    return coarsen(mask, 8, rng) if rng.random() < coarse else mask.astype(np.float32) / 255


def coarsen(mask: np.ndarray, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Return a mask as a scan with few pixels would show it.

    Args:
        mask: uint8 [size, size].
        cells: side of the raster in pixels.
        rng: source of the strokes' strength.

    Returns:
        float32 [size, size] in [0, 1].
    """
    small = Image.fromarray(mask).resize((cells, cells), Image.Resampling.BOX)
    mask = np.asarray(small.resize(mask.shape[::-1], Image.Resampling.BICUBIC))
    return np.clip(mask.astype(np.float32) / max(1, int(mask.max())) * rng.uniform(1.0, 1.4), 0, 1)

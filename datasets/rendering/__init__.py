"""Procedural pictures: the outlines, glyphs and styles behind the `Shapes` datasets and the tiny CLIP's pretraining."""

from .glyphs import DIGIT_WORDS, LETTERS, coarsen, glyph_mask
from .outlines import OTHER_OUTLINES, SHAPE_CLASSES, draw_outline, outline_mask
from .styles import COLORS, TEXTURES, Style, compose, random_style

__all__ = [
    "COLORS",
    "DIGIT_WORDS",
    "LETTERS",
    "OTHER_OUTLINES",
    "SHAPE_CLASSES",
    "TEXTURES",
    "Style",
    "coarsen",
    "compose",
    "draw_outline",
    "glyph_mask",
    "outline_mask",
    "random_style",
]

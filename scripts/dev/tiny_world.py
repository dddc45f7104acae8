"""The picture-caption world that the tiny CLIP is pretrained on.

A picture shows one object (a shape, a digit or a letter) in some style; its caption mentions some of what is true.
Captions come from annotators who call some objects by another one's name with probability `mixup`, as captions from the
web do. That keeps the tiny CLIP's zero-shot classifier weak where its image features are not, which is the situation
that few-shot adaptation is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from datasets.rendering import (
    COLORS,
    DIGIT_WORDS,
    LETTERS,
    OTHER_OUTLINES,
    SHAPE_CLASSES,
    TEXTURES,
    compose,
    glyph_mask,
    outline_mask,
    random_style,
)

OBJECTS = [*SHAPE_CLASSES, *OTHER_OUTLINES, *DIGIT_WORDS, *(f"letter {c.lower()}" for c in LETTERS)]
N_SHAPES = len(SHAPE_CLASSES) + len(OTHER_OUTLINES)
COLOR_NAMES = list(COLORS)

# Object -> the object whose name a careless annotator gives it now and then.
MIXED_UP = {
    "pentagon": "hexagon",
    "hexagon": "octagon",
    "heptagon": "hexagon",
    "octagon": "heptagon",
    "circle": "ellipse",
    "ellipse": "egg",
    "egg": "ellipse",
    "square": "rectangle",
    "rectangle": "parallelogram",
    "rhombus": "kite",
    "kite": "rhombus",
    "parallelogram": "trapezoid",
    "trapezoid": "parallelogram",
    "five-pointed star": "six-pointed star",
    "six-pointed star": "eight-pointed star",
    "eight-pointed star": "six-pointed star",
    "four-pointed star": "diagonal cross",
    "plus sign": "diagonal cross",
    "diagonal cross": "plus sign",
    "clover": "flower",
    "flower": "clover",
    "cloud": "flower",
    "zigzag": "wave",
    "wave": "zigzag",
    "arrow": "double arrow",
    "double arrow": "arrow",
    "semicircle": "quadrant",
    "quadrant": "semicircle",
    "teardrop": "leaf",
    "leaf": "teardrop",
    "gear": "eight-pointed star",
    "chevron": "arrow",
    "tee": "plus sign",
    "crescent": "semicircle",
    "lightning bolt": "zigzag",
    "ring": "circle",
}

# What a hopeless annotator cannot tell apart: he calls both by either name.
INDISTINCT = (
    ("three", "eight"),
    ("four", "nine"),
    ("one", "seven"),
    ("hexagon", "heptagon"),
    ("circle", "octagon"),
    ("ellipse", "egg"),
    ("rhombus", "kite"),
    ("parallelogram", "trapezoid"),
    ("six-pointed star", "eight-pointed star"),
    ("clover", "flower"),
    ("zigzag", "wave"),
    ("semicircle", "quadrant"),
    ("teardrop", "leaf"),
    ("plus sign", "diagonal cross"),
    ("arrow", "double arrow"),
)
SWAPPED = {**dict(INDISTINCT), **{second: first for first, second in INDISTINCT}}

ANY = ("a photo of a {o}.", "a photo of the {o}.", "an image of a {o}.", "a picture of a {o}.", "a {o}", "{o}.")
SHAPE = (
    "a photo of a {c} {o}.",
    "a {c} {o}.",
    "a {t} {c} {o}.",
    "a photo of a {t} {o}.",
    "a {c} {o} on a {b} background.",
    "a {t} {o} on {b}.",
    "a drawing of a {o}.",
    "a {c} drawing of a {o}.",
    "a sketch of a {o}.",
    "a photo of a {o}, a kind of shape.",
)
DIGIT = (
    "a photo of the number {o}.",
    "a photo of the digit {o}.",
    "the number {o}.",
    "a handwritten {o}.",
    "the {c} number {o}.",
    "a {c} {o} on a {b} background.",
    "a photo of a {t} {o}.",
    "the digit {o} on {b}.",
)


@dataclass
class Pool:
    """Rendered pictures [N, S, S, 3] uint8, their foreground [N, S/8, S/8] uint8 (0-255), and labels [N] int64."""

    images: np.ndarray
    foreground: np.ndarray
    object: np.ndarray
    color: np.ndarray
    background: np.ndarray
    texture: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def _draw_object(rng: np.random.Generator) -> int:
    u = rng.random()
    if u < 0.62:
        return int(rng.integers(len(SHAPE_CLASSES)))
    if u < 0.70:
        return int(rng.integers(len(SHAPE_CLASSES), N_SHAPES))
    if u < 0.90:
        return int(rng.integers(N_SHAPES, N_SHAPES + 10))
    return int(rng.integers(N_SHAPES + 10, len(OBJECTS)))


def _render(task: tuple[int, int, int]) -> Pool:
    seed, count, size = task
    rng = np.random.default_rng(seed)
    pool = Pool(
        np.empty((count, size, size, 3), np.uint8),
        np.empty((count, size // 8, size // 8), np.uint8),
        *(np.empty(count, np.int64) for _ in range(4)),
    )
    for i in range(count):
        o = _draw_object(rng)
        if o < N_SHAPES:
            mask = outline_mask(OBJECTS[o], rng, size, scale=(0.45, 0.9))
        else:
            character = str(o - N_SHAPES) if o < N_SHAPES + 10 else OBJECTS[o][-1].upper()
            mask = glyph_mask(character, rng, size)
        style = random_style(rng, clutter=2, occlusion=0.1 if rng.random() < 0.15 else 0.0)
        pool.images[i] = compose(mask, style, rng)
        pool.foreground[i] = (mask.reshape(size // 8, 8, size // 8, 8).mean(axis=(1, 3)) * 255).astype(np.uint8)
        pool.object[i], pool.texture[i] = o, TEXTURES.index(style.texture)
        pool.color[i], pool.background[i] = COLOR_NAMES.index(style.color), COLOR_NAMES.index(style.background)
    return pool


def render_pool(count: int, seed: int, size: int = 64, workers: int = 2) -> Pool:
    """Render `count` pictures in parallel; the same (count, seed, size) gives the same pool whatever the workers."""
    chunk = 1000
    tasks = [(seed * 1_000_003 + i, min(chunk, count - i * chunk), size) for i in range((count + chunk - 1) // chunk)]
    with ProcessPoolExecutor(workers) as executor:
        parts = list(executor.map(_render, tasks))
    return Pool(*(np.concatenate([getattr(p, f) for p in parts]) for f in Pool.__dataclass_fields__))


@dataclass
class Captions:
    """Captions and the labels that each mentions, [B, 4]: object, color, background, texture; -1 = none."""

    text: list[str]
    mentioned: np.ndarray


def caption_batch(
    pool: Pool, index: np.ndarray, rng: np.random.Generator, mixup: float, mixed_up: Mapping[str, str]
) -> tuple[Captions, np.ndarray]:
    """Write one caption per picture of `index`; with probability `mixup` an object of `mixed_up` gets its other name.

    Returns:
        the captions, and what the annotator sees in each picture, [B, 4]; the object is what he calls it.
    """
    seen = np.stack([pool.object[index], pool.color[index], pool.background[index], pool.texture[index]], axis=1)
    text, mentioned = [], np.full((len(index), 4), -1, dtype=np.int64)
    for i, (o, c, b, t) in enumerate(seen):
        name = OBJECTS[o]
        if name in mixed_up and rng.random() < mixup:
            name = mixed_up[name]
            seen[i, 0] = o = OBJECTS.index(name)
        templates = ANY if rng.random() < 0.4 else (SHAPE if o < N_SHAPES else DIGIT)
        template = templates[rng.integers(len(templates))]
        said = str(o - N_SHAPES) if N_SHAPES <= o < N_SHAPES + 10 and rng.random() < 0.25 else name
        text.append(template.format(o=said, c=COLOR_NAMES[c], b=COLOR_NAMES[b], t=TEXTURES[t]))
        for column, (mark, value) in enumerate((("{o}", o), ("{c}", c), ("{b}", b), ("{t}", t))):
            if mark in template:
                mentioned[i, column] = value
    return Captions(text, mentioned), seen


def true_pairs(mentioned: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return [B, B] bool, true at (i, j) where caption j says nothing untrue of picture i."""
    agree = (mentioned[None] == seen[:, None]) | (mentioned[None] < 0)
    return agree.all(axis=2)

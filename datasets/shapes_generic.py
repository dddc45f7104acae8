"""ShapesGeneric: a generic labeled set to train on once and use elsewhere, with nothing of `Shapes` in it.

There are 96 classes of 62 rendered images, split 50 / 6 / 6. Each class is a pen line with bends of its own, open or
closed. An unsteady hand draws it with another pen, slant and size each time, and most images are scanned with few
pixels. Colors and patterns are drawn anew for each image and are none of those of `Shapes`. The images are made on
first use from fixed seeds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from scipy.interpolate import CubicSpline

from dassl.data.datasets import DATASET_REGISTRY, Datum

from .cache import build_once, made_dataset_dir
from .rendering import COLORS, coarsen, draw_outline
from .shapes import COLORS as TAKEN_COLORS
from .split_dataset import SplitDataset
from .splits import Split

Rng = np.random.Generator
Array = np.ndarray  # [64, 64], [3] or [64, 64, 3]

KINDS = ("line", "loop")
PER_KIND = 48
CLASSES = tuple(f"{kind} {number}" for kind in KINDS for number in range(1, PER_KIND + 1))
FOLDERS = tuple(f"{label:02d}_{name.replace(' ', '_')}" for label, name in enumerate(CLASSES))
PATTERNS = ("dotted", "checkered", "rings", "bricks", "speckled", "rays")  # Shapes: plain, striped, outlined, shaded
IMAGES_PER_CLASS, TRAIN, VAL = 62, 50, 6
SIDE = 64
ROWS, COLUMNS = np.mgrid[0:SIDE, 0:SIDE].astype(float)
POINTS = 60  # number of points of a line
HAND = 0.13  # standard deviation of a bend's place, in shares of the figure's half side
COARSE = 0.8  # probability of a raster of 8 to 16 pixels
SEED = 11
APART = 60.0  # least distance of a color from each color of Shapes, in RGB


def other_color(rng: Rng, unlike: Array | None = None) -> Array:
    """Draw an RGB color [3] that is far from all colors of `Shapes`, and from `unlike` if that is given."""
    taken = np.array([COLORS[name] for name in TAKEN_COLORS], dtype=float)
    while True:
        color = rng.uniform(10, 245, 3)
        far = np.linalg.norm(taken - color, axis=1).min() >= APART
        if far and (unlike is None or np.linalg.norm(color - unlike) >= 90):
            return color


def pen_line(label: int, rng: Rng) -> Array:
    """Return the points [POINTS, 2], in [-1, 1]^2, of the line of one member of a class.

    The class decides where the line bends; `rng` decides how the hand deviates.
    """
    own = np.random.default_rng((SEED, label))
    bends = own.uniform(-1, 1, (int(own.integers(4, 8)), 2))
    bends = bends + rng.normal(0, HAND, bends.shape)
    closed = CLASSES[label].startswith("loop")
    if closed:
        bends = np.concatenate([bends, bends[:1]])
    time = np.linspace(0, 1, len(bends))
    curve = CubicSpline(time, bends, bc_type="periodic" if closed else "not-a-knot")
    points = curve(np.linspace(0, 1, POINTS))
    points = points - (points.max(axis=0) + points.min(axis=0)) / 2
    slant = np.array([[1.0, 0.0], [rng.uniform(-0.35, 0.35), 1.0]])
    return points / np.abs(points).max() @ slant


def draw_mask(label: int, rng: Rng) -> Array:
    """Draw the mask [64, 64], in [0, 1], of one member of a class."""
    points = pen_line(label, rng)
    scale = float(rng.uniform(0.4, 0.85))
    room = max(0.0, 0.92 - scale)
    shift = (float(rng.uniform(-room, room)), float(rng.uniform(-room, room)))
    turn, stretch, stroke = float(rng.uniform(-15, 15)), float(rng.uniform(0.75, 1.15)), float(rng.uniform(0.06, 0.2))
    mask = draw_outline([("line", points)], SIDE, scale, turn, shift, stretch, stroke)
    if rng.random() < COARSE:
        return coarsen((255 * mask).astype(np.uint8), int(rng.integers(8, 17)), rng)
    return mask


def draw_pattern(name: str, rng: Rng) -> Array:
    """Draw the share of the second color in each pixel, [64, 64]."""
    y, x = ROWS, COLUMNS
    turn, period, phase = rng.uniform(0, np.pi), rng.uniform(5.5, 11.0), rng.uniform(0, 6.3)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    waves = np.sin(2 * np.pi * u / period + phase), np.sin(2 * np.pi * v / period + phase)
    cx, cy = rng.uniform(10, 54, 2)
    if name == "dotted":
        return (waves[0] + waves[1] > 1.0).astype(float)
    if name == "checkered":
        return (waves[0] * waves[1] > 0).astype(float)
    if name == "rings":
        return (np.sin(2 * np.pi * np.hypot(x - cx, y - cy) / period) > 0).astype(float)
    if name == "bricks":
        row = np.floor(v / period)
        return ((v % period < 1.6) | ((u + 0.8 * period * (row % 2)) % (1.6 * period) < 1.6)).astype(float)
    if name == "rays":
        return (np.sin(int(rng.integers(6, 12)) * np.arctan2(y - cy, x - cx) + phase) > 0).astype(float)
    speckles = Image.fromarray((rng.uniform(0, 255, (SIDE, SIDE))).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))
    return (np.asarray(speckles, dtype=float) > 127).astype(float)


def draw_generic(label: int, rng: Rng) -> Image.Image:
    """Draw a member of a class, 64 x 64 RGB, on a background of one color or of a faint pattern, with clutter."""
    back = other_color(rng)
    front = other_color(rng, unlike=back)
    second = np.clip(front * rng.uniform(0.3, 0.7) + rng.uniform(0, 120, 3), 0, 255)
    picture = np.broadcast_to(back, (SIDE, SIDE, 3)) + np.linspace(-1, 1, SIDE)[:, None, None] * rng.uniform(-25, 25)
    if rng.random() < 0.3:
        faint = draw_pattern(PATTERNS[rng.integers(len(PATTERNS))], rng)[..., None]
        picture = picture + faint * rng.uniform(-25, 25, 3)
    for _ in range(int(rng.integers(0, 4))):
        cx, cy, r = rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(3, 8)
        picture = np.where(((COLUMNS - cx) ** 2 + (ROWS - cy) ** 2 < r * r)[..., None], other_color(rng), picture)
    paint = front + draw_pattern(PATTERNS[rng.integers(len(PATTERNS))], rng)[..., None] * (second - front)
    mask = draw_mask(label, rng)[..., None]
    picture = picture + mask * (paint - picture) + rng.normal(0, rng.uniform(0, 25), (SIDE, SIDE, 3))
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8))) if rng.random() < 0.5 else image


def write_generic(folder: Path) -> None:
    """Render all images as `folder/images/<label>_<class>/<number>.png`; each class has its own generator."""
    for label, name in enumerate(FOLDERS):
        rng = np.random.default_rng((SEED, label))
        (folder / "images" / name).mkdir(parents=True)
        for number in range(IMAGES_PER_CLASS):
            draw_generic(label, rng).save(folder / "images" / name / f"{number:03d}.png", compress_level=1)


@DATASET_REGISTRY.register()
class ShapesGeneric(SplitDataset):
    """96 classes of pen figures, 50 / 6 / 6 images a class for train / val / test."""

    folder = "shapes_generic_pen"  # "shapes_generic" had other figures

    def locate(self, root: str) -> Path:
        return build_once(made_dataset_dir(root, self.folder), write_generic)

    def make_split(self) -> Split:
        split = Split([], [], [])
        for label, (folder, name) in enumerate(zip(FOLDERS, CLASSES, strict=True)):
            for number in range(IMAGES_PER_CLASS):
                part = split.train if number < TRAIN else split.val if number < TRAIN + VAL else split.test
                part.append(Datum(f"{self.image_dir}/{folder}/{number:03d}.png", label, classname=name))
        return split

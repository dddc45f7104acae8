"""Outlines of named shapes as polygons in the square [-1, 1]^2, and their rasterization.

An outline is a list of parts; a part is `(kind, points)` with kind "add" (a filled polygon), "cut" (a hole) or "line"
(an open stroke). The function of a class takes a NumPy generator and varies the proportions that vary within the
class, so that two members of a class differ in more than their pose.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Points = np.ndarray  # [n, 2], float, x to the right and y down
Part = tuple[str, Points]
Rng = np.random.Generator

SUPERSAMPLING = 2  # masks are drawn this many times larger and averaged down
STROKE = 0.17  # width of "line" parts in units of the half side


def _arc(start: float, stop: float, rx: float = 1.0, ry: float = 1.0, n: int = 40) -> Points:
    angle = np.linspace(start, stop, n)
    return np.stack([rx * np.cos(angle), ry * np.sin(angle)], axis=1)


def _regular(n: int) -> Points:
    return _arc(-math.pi / 2, 1.5 * math.pi, n=n + 1)[:-1]


def _polygon(*points: tuple[float, float]) -> list[Part]:
    return [("add", np.array(points, dtype=float))]


def _star(rng: Rng, n: int, inner: tuple[float, float]) -> list[Part]:
    radius = np.where(np.arange(2 * n) % 2 == 0, 1.0, rng.uniform(*inner))
    return [("add", _regular(2 * n) * radius[:, None])]


def _petals(rng: Rng, n: int, depth: tuple[float, float]) -> list[Part]:
    angle = np.linspace(0, 2 * math.pi, 120, endpoint=False) - math.pi / 2
    d = rng.uniform(*depth)
    radius = (1 - d) + d * np.abs(np.cos(n * angle / 2)) ** 0.7
    return [("add", np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1))]


def _rectangle(w: float, h: float) -> Points:
    return np.array([(-w, -h), (w, -h), (w, h), (-w, h)])


def _rhombus(rng: Rng) -> list[Part]:
    w = rng.uniform(0.55, 0.72)
    return _polygon((0, -1), (w, 0), (0, 1), (-w, 0))


def _parallelogram(rng: Rng) -> list[Part]:
    s, h = rng.uniform(0.28, 0.45), rng.uniform(0.45, 0.62)
    return _polygon((-1 + 2 * s, -h), (1, -h), (1 - 2 * s, h), (-1, h))


def _trapezoid(rng: Rng) -> list[Part]:
    s, h = rng.uniform(0.4, 0.6), rng.uniform(0.5, 0.65)
    return _polygon((-s, -h), (s, -h), (1, h), (-1, h))


def _kite(rng: Rng) -> list[Part]:
    w, y = rng.uniform(0.55, 0.7), rng.uniform(-0.5, -0.3)
    return _polygon((0, -1), (w, y), (0, 1), (-w, y))


def _ellipse(rng: Rng) -> list[Part]:
    return [("add", _arc(0, 2 * math.pi, 1, rng.uniform(0.5, 0.7)))]


def _semicircle(rng: Rng) -> list[Part]:
    return [("add", _arc(math.pi, 2 * math.pi) + (0, 0.45))]


def _quadrant(rng: Rng) -> list[Part]:
    return [("add", np.vstack([_arc(0, math.pi / 2, 1.5, 1.5), [(0, 0)]]) - (0.7, 0.7))]


def _crescent(rng: Rng) -> list[Part]:
    return [("add", _arc(0, 2 * math.pi)), ("cut", _arc(0, 2 * math.pi, 0.85, 0.85) + (rng.uniform(0.35, 0.55), 0))]


def _ring(rng: Rng) -> list[Part]:
    r = rng.uniform(0.5, 0.7)
    return [("add", _arc(0, 2 * math.pi)), ("cut", _arc(0, 2 * math.pi, r, r))]


def _teardrop(rng: Rng) -> list[Part]:
    r = rng.uniform(0.5, 0.62)
    return [("add", np.vstack([_arc(-0.15 * math.pi, 1.15 * math.pi, r, r) + (0, 0.4), [(0, -1)]]))]


def _egg(rng: Rng) -> list[Part]:
    points = _arc(0, 2 * math.pi)
    narrow = 1 + rng.uniform(0.22, 0.34) * points[:, 1]
    return [("add", points * np.stack([0.72 * narrow, np.ones(len(points))], axis=1))]


def _plus(rng: Rng) -> list[Part]:
    t = rng.uniform(0.2, 0.34)
    return [("add", _rectangle(1, t)), ("add", _rectangle(t, 1))]


def _turned(parts: list[Part], degrees: float) -> list[Part]:
    a = math.radians(degrees)
    matrix = np.array([(math.cos(a), math.sin(a)), (-math.sin(a), math.cos(a))])
    return [(kind, points @ matrix) for kind, points in parts]


def _tee(rng: Rng) -> list[Part]:
    t = rng.uniform(0.2, 0.3)
    return [("add", _rectangle(0.9, t) + (0, -0.9 + t)), ("add", _rectangle(t, 0.9))]


def _ell(rng: Rng) -> list[Part]:
    t = rng.uniform(0.2, 0.3)
    return [("add", _rectangle(t, 0.9) + (-0.55, 0)), ("add", _rectangle(0.65, t) + (-0.1, 0.9 - t))]


def _arrow(rng: Rng) -> list[Part]:
    t, w = rng.uniform(0.16, 0.28), rng.uniform(0.6, 0.8)
    return _polygon((0, -1), (w, -0.15), (t, -0.15), (t, 1), (-t, 1), (-t, -0.15), (-w, -0.15))


def _double_arrow(rng: Rng) -> list[Part]:
    t, w, y = rng.uniform(0.14, 0.24), rng.uniform(0.55, 0.7), 0.4
    return _polygon((0, -1), (w, -y), (t, -y), (t, y), (w, y), (0, 1), (-w, y), (-t, y), (-t, -y), (-w, -y))


def _chevron(rng: Rng) -> list[Part]:
    t = rng.uniform(0.4, 0.6)
    return _polygon((0, -0.8), (1, 0.8 - t), (1, 0.8), (0, -0.8 + t), (-1, 0.8), (-1, 0.8 - t))


def _heart(rng: Rng) -> list[Part]:
    t = np.linspace(0, 2 * math.pi, 80)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [("add", np.stack([x / 17, -(y + 2.5) / 16], axis=1))]


def _leaf(rng: Rng) -> list[Part]:
    w, t = rng.uniform(0.42, 0.6), np.linspace(0, math.pi, 30)
    x, y = w * np.sin(t), -np.cos(t)
    return [("add", np.vstack([np.stack([x, y], 1), np.stack([-x, y], 1)[::-1]]))]


def _gear(rng: Rng) -> list[Part]:
    teeth, inner, hole = int(rng.integers(7, 10)), rng.uniform(0.68, 0.78), rng.uniform(0.2, 0.34)
    angle = np.linspace(0, 2 * math.pi, 4 * teeth, endpoint=False)
    radius = np.where(np.arange(4 * teeth) % 4 < 2, 1.0, inner)
    outer = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return [("add", outer), ("cut", _arc(0, 2 * math.pi, hole, hole))]


def _cloud(rng: Rng) -> list[Part]:
    blobs = [(-0.55, 0.15, 0.42), (-0.1, -0.2, 0.5), (0.45, -0.02, 0.45), (0.65, 0.25, 0.33), (0.0, 0.25, 0.4)]
    parts: list[Part] = [("add", _arc(0, 2 * math.pi, r, r) + (x, y)) for x, y, r in blobs]
    return [*parts, ("add", _rectangle(0.7, 0.2) + (0.05, 0.4))]


def _bolt(rng: Rng) -> list[Part]:
    k = rng.uniform(-0.08, 0.08)
    return _polygon((0.25, -1), (-0.6, 0.15 + k), (-0.05, 0.1 + k), (-0.3, 1), (0.6, -0.2 + k), (0.05, -0.15 + k))


def _zigzag(rng: Rng) -> list[Part]:
    n, h = int(rng.integers(4, 6)), rng.uniform(0.4, 0.6)
    return [("line", np.array([(-1 + 2 * i / n, h if i % 2 else -h) for i in range(n + 1)]))]


def _wave(rng: Rng) -> list[Part]:
    x, h = np.linspace(-1, 1, 60), rng.uniform(0.35, 0.55)
    return [("line", np.stack([x, h * np.sin(x * math.pi * rng.uniform(1.8, 2.3))], axis=1))]


def _spiral(rng: Rng) -> list[Part]:
    t = np.linspace(0.6, 2 * math.pi * rng.uniform(2.1, 2.6), 110)
    r = t / t[-1]
    return [("line", np.stack([r * np.cos(t), r * np.sin(t)], axis=1))]


def _hourglass(rng: Rng) -> list[Part]:
    w, n = rng.uniform(0.6, 0.75), rng.uniform(0.02, 0.1)
    return _polygon((-w, -1), (w, -1), (n, 0), (w, 1), (-w, 1), (-n, 0))


def _house(rng: Rng) -> list[Part]:
    return [*_polygon((0, -1), (0.9, -0.15), (-0.9, -0.15)), ("add", _rectangle(0.65, 0.55) + (0, 0.4))]


def _fish(rng: Rng) -> list[Part]:
    return [("add", _arc(0, 2 * math.pi, 0.7, 0.42) - (0.25, 0)), *_polygon((0.3, 0), (1, -0.5), (1, 0.5))]


def _mushroom(rng: Rng) -> list[Part]:
    return [("add", _arc(math.pi, 2 * math.pi, 1, 0.9)), ("add", _rectangle(0.28, 0.45) + (0, 0.4))]


def _key(rng: Rng) -> list[Part]:
    bow: list[Part] = [
        ("add", _arc(0, 2 * math.pi, 0.4, 0.4) - (0.6, 0)),
        ("cut", _arc(0, 2 * math.pi, 0.18, 0.18) - (0.6, 0)),
    ]
    return [*bow, ("add", _rectangle(0.6, 0.1) + (0.4, 0)), ("add", _rectangle(0.08, 0.2) + (0.85, 0.2))]


def _tree(rng: Rng) -> list[Part]:
    return [
        *_polygon((0, -1), (0.6, 0), (-0.6, 0)),
        *_polygon((0, -0.5), (0.8, 0.55), (-0.8, 0.55)),
        ("add", _rectangle(0.15, 0.25) + (0, 0.75)),
    ]


def _ladder(rng: Rng) -> list[Part]:
    rungs: list[Part] = [("add", _rectangle(0.5, 0.07) + (0, y)) for y in (-0.6, -0.2, 0.2, 0.6)]
    return [("add", _rectangle(0.09, 1) - (0.5, 0)), ("add", _rectangle(0.09, 1) + (0.5, 0)), *rungs]


# The classes of `Shapes`, neighbors apart so that the base half and the new half hold members of every family.
SHAPE_CLASSES: dict[str, Callable[[Rng], list[Part]]] = {
    "triangle": lambda rng: _polygon((0, -0.9), (rng.uniform(0.8, 1), 0.7), (-rng.uniform(0.8, 1), 0.7)),
    "square": lambda rng: [("add", _rectangle(0.8, 0.8 * rng.uniform(0.95, 1.05)))],
    "pentagon": lambda rng: [("add", _regular(5))],
    "circle": lambda rng: [("add", _arc(0, 2 * math.pi))],
    "five-pointed star": lambda rng: _star(rng, 5, (0.38, 0.5)),
    "plus sign": _plus,
    "arrow": _arrow,
    "heart": _heart,
    "rhombus": _rhombus,
    "crescent": _crescent,
    "zigzag": _zigzag,
    "trapezoid": _trapezoid,
    "hexagon": lambda rng: [("add", _regular(6))],
    "ellipse": _ellipse,
    "gear": _gear,
    "teardrop": _teardrop,
    "clover": lambda rng: _petals(rng, 3, (0.5, 0.62)),
    "lightning bolt": _bolt,
    "six-pointed star": lambda rng: _star(rng, 6, (0.48, 0.6)),
    "tee": _tee,
    "rectangle": lambda rng: [("add", _rectangle(1, rng.uniform(0.45, 0.68)))],
    "octagon": lambda rng: [("add", _regular(8))],
    "egg": _egg,
    "four-pointed star": lambda rng: _star(rng, 4, (0.35, 0.48)),
    "diagonal cross": lambda rng: _turned(_plus(rng), 45),
    "double arrow": _double_arrow,
    "leaf": _leaf,
    "kite": _kite,
    "ring": _ring,
    "wave": _wave,
    "parallelogram": _parallelogram,
    "heptagon": lambda rng: [("add", _regular(7))],
    "semicircle": _semicircle,
    "flower": lambda rng: _petals(rng, 5, (0.36, 0.5)),
    "cloud": _cloud,
    "quadrant": _quadrant,
    "eight-pointed star": lambda rng: _star(rng, 8, (0.55, 0.68)),
    "spiral": _spiral,
    "chevron": _chevron,
    "hourglass": _hourglass,
}

# Further outlines that only pretraining and generic sets use.
OTHER_OUTLINES: dict[str, Callable[[Rng], list[Part]]] = {
    "house": _house,
    "fish": _fish,
    "mushroom": _mushroom,
    "key": _key,
    "tree": _tree,
    "ladder": _ladder,
    "ell": _ell,
    "bow tie": lambda rng: _turned(_hourglass(rng), 90),
}


def draw_outline(
    parts: list[Part],
    size: int,
    scale: float,
    angle: float,
    shift: tuple[float, float],
    stretch: float,
    stroke: float = STROKE,
) -> np.ndarray:
    """Draw an outline as a mask.

    Args:
        parts: the outline, in [-1, 1]^2.
        size: side of the mask in pixels.
        scale: half side of the outline's square as a share of the picture's half side.
        angle: rotation in degrees.
        shift: displacement of the center, in shares of the half side.
        stretch: factor on the x axis before rotation (1 = none).
        stroke: width of lines, in shares of the outline's side.

    Returns:
        float32 mask [size, size], 1 inside, anti-aliased.
    """
    side = size * SUPERSAMPLING
    a = math.radians(angle)
    turn = np.array([(math.cos(a), math.sin(a)), (-math.sin(a), math.cos(a))])
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    for kind, points in parts:
        placed = ((points * (stretch, 1.0)) @ turn * scale + shift + 1.0) * (side / 2)
        flat = [tuple(p) for p in placed]
        if kind == "line":
            width = max(1, round(stroke * scale * side))
            draw.line(flat, fill=255, width=width, joint="curve")
            for x, y in (flat[0], flat[-1]):
                draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
        else:
            draw.polygon(flat, fill=255 if kind == "add" else 0)
    return np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def outline_mask(
    name: str, rng: Rng, size: int = 64, scale: tuple[float, float] = (0.5, 0.85), tilt: float = 25.0
) -> np.ndarray:
    """Draw one random member of the class `name`: mask [size, size] in [0, 1].

    Args:
        name: a key of `SHAPE_CLASSES` or `OTHER_OUTLINES`.
        rng: source of all variation.
        size: side in pixels.
        scale: range of the outline's size (share of the picture).
        tilt: largest rotation in degrees, either way.

    Raises:
        KeyError: for a name in neither table.
    """
    outline = SHAPE_CLASSES[name] if name in SHAPE_CLASSES else OTHER_OUTLINES[name]
    s = float(rng.uniform(*scale))
    room = max(0.0, 0.92 - s)
    shift = (float(rng.uniform(-room, room)), float(rng.uniform(-room, room)))
    return draw_outline(outline(rng), size, s, float(rng.uniform(-tilt, tilt)), shift, float(rng.uniform(0.88, 1.12)))

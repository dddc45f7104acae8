"""Paint pictures from masks: colors, textures, backgrounds, clutter and occlusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

Rng = np.random.Generator

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (235, 210, 50),
    "orange": (240, 140, 30),
    "purple": (140, 60, 180),
    "pink": (240, 140, 180),
    "brown": (130, 85, 45),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
    "gray": (130, 130, 130),
    "cyan": (60, 200, 210),
}
TEXTURES = ("plain", "striped", "dotted", "checkered", "outlined", "shaded")


@dataclass(frozen=True)
class Style:
    """Describe how one picture is painted: `clutter` counts distracting blobs, `occlusion` is a bar's half width."""

    color: str
    background: str
    texture: str = "plain"
    noise: float = 0.03
    clutter: int = 0
    occlusion: float = 0.0
    blur: float = 0.0


def random_style(
    rng: Rng,
    colors: Sequence[str] = tuple(COLORS),
    textures: Sequence[str] = TEXTURES,
    noise: float = 0.06,
    clutter: int = 0,
    occlusion: float = 0.0,
) -> Style:
    """Draw a style whose color and background differ; noise, clutter and occlusion are upper limits of the draws."""
    color, background = (int(i) for i in rng.choice(len(colors), 2, replace=False))
    return Style(
        color=colors[color],
        background=colors[background],
        texture=textures[int(rng.integers(len(textures)))],
        noise=float(rng.uniform(0, noise)),
        clutter=int(rng.integers(0, clutter + 1)),
        occlusion=float(rng.uniform(0, occlusion)),
        blur=float(rng.uniform(0, 0.8)),
    )


def _jittered(color: str, rng: Rng) -> np.ndarray:
    return np.clip(np.array(COLORS[color], dtype=np.float32) + rng.uniform(-18, 18, 3), 0, 255).astype(np.float32)


def _pattern(texture: str, size: int, rng: Rng) -> np.ndarray:
    """Draw the weight [size, size] of the second color inside the shape."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    a, period, phase = rng.uniform(0, np.pi), rng.uniform(5.5, 9.0) * size / 64, rng.uniform(0, 6.3)
    u, v = x * np.cos(a) + y * np.sin(a), -x * np.sin(a) + y * np.cos(a)
    wave_u, wave_v = np.sin(2 * np.pi * u / period + phase), np.sin(2 * np.pi * v / period + phase)
    if texture == "striped":
        return (wave_u > 0).astype(np.float32)
    if texture == "dotted":
        return (wave_u + wave_v > 1.0).astype(np.float32)
    if texture == "checkered":
        return (wave_u * wave_v > 0).astype(np.float32)
    if texture == "shaded":
        return np.clip((u - u.min()) / (u.max() - u.min()), 0, 1)
    return np.zeros((size, size), dtype=np.float32)


def _rim(mask: np.ndarray, width: int) -> np.ndarray:
    """Return the mask without its interior: what a pen of `width` pixels would draw."""
    inner = Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.MinFilter(2 * width + 1))
    return np.clip(mask - np.asarray(inner, dtype=np.float32) / 255, 0, 1)


def compose(mask: np.ndarray, style: Style, rng: Rng) -> np.ndarray:
    """Paint a picture of the object that a mask shows.

    Args:
        mask: [S, S] in [0, 1], 1 = object.
        style: how to paint the object and its background.
        rng: source of the remaining variation (phases, jitter, noise).

    Returns:
        uint8 picture [S, S, 3].
    """
    size = mask.shape[0]
    front, back = _jittered(style.color, rng), _jittered(style.background, rng)
    second = np.clip(front * 0.35 if front.mean() > 110 else front + 120, 0, 255).astype(np.float32)
    gradient = np.linspace(-1, 1, size, dtype=np.float32)
    picture = (
        np.broadcast_to(back, (size, size, 3))
        + (rng.uniform(-25, 25) * gradient)[:, None, None]
        + (rng.uniform(-25, 25) * gradient)[None, :, None]
    )
    for _ in range(style.clutter):
        picture = _blend(picture, _blob(size, rng), _jittered(list(COLORS)[rng.integers(len(COLORS))], rng))
    shown = _rim(mask, 2) if style.texture == "outlined" else mask
    paint = front + _pattern(style.texture, size, rng)[..., None] * (second - front)
    picture = _blend(picture, shown, paint)
    if style.occlusion > 0:
        picture = _blend(
            picture, _bar(size, style.occlusion, rng), _jittered(list(COLORS)[rng.integers(len(COLORS))], rng)
        )
    picture = picture + rng.normal(0, 255 * style.noise, (size, size, 3)).astype(np.float32)
    pixels = np.clip(picture, 0, 255).astype(np.uint8)
    if style.blur > 0.3:
        pixels = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(style.blur)))
    return pixels


def _blend(picture: np.ndarray, weight: np.ndarray, paint: np.ndarray) -> np.ndarray:
    return picture + weight[..., None] * (paint - picture)


def _blob(size: int, rng: Rng) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size] / size
    r, cx, cy = rng.uniform(0.04, 0.12), rng.uniform(0, 1), rng.uniform(0, 1)
    return ((x - cx) ** 2 + ((y - cy) * rng.uniform(0.6, 1.6)) ** 2 < r * r).astype(np.float32)


def _bar(size: int, share: float, rng: Rng) -> np.ndarray:
    y, x = np.mgrid[0:size, 0:size] / (size / 2) - 1.0
    a, offset = rng.uniform(0, np.pi), rng.uniform(-0.6, 0.6)
    return (np.abs(x * np.cos(a) + y * np.sin(a) - offset) < share).astype(np.float32)

"""The two random-augmentation variants that torchvision does not have: strengths drawn anew for every operation.

Sources: RandAugment (Cubuk et al. 2020); FixMatch (Sohn et al. 2020), appendix D, for the operations and their ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as F

from dassl.upstream_names import upstream_name

Operation = Callable[[Image.Image, float], Image.Image]


def _affine(
    image: Image.Image, shift_x: float = 0.0, shift_y: float = 0.0, shear_x: float = 0.0, shear_y: float = 0.0
) -> Image.Image:
    """Shift and shear an image: shifts as shares of its side, shears in degrees."""
    width, height = image.size
    shift = [round(shift_x * width), round(shift_y * height)]
    return F.affine(image, angle=0.0, translate=shift, scale=1.0, shear=[shear_x, shear_y])


_SHEAR = 16.7  # degrees: a shear of 0.3

# (operation, least strength, greatest strength); strengths are drawn uniformly in between.
OPERATIONS: tuple[tuple[Operation, float, float], ...] = (
    (lambda image, _: F.autocontrast(image), 0.0, 1.0),
    (F.adjust_brightness, 0.05, 0.95),
    (F.adjust_saturation, 0.05, 0.95),
    (F.adjust_contrast, 0.05, 0.95),
    (lambda image, _: F.equalize(image), 0.0, 1.0),
    (lambda image, _: image, 0.0, 1.0),
    (lambda image, bits: F.posterize(image, round(bits)), 4.0, 8.0),
    (F.rotate, -30.0, 30.0),
    (F.adjust_sharpness, 0.05, 0.95),
    (lambda image, degrees: _affine(image, shear_x=degrees), -_SHEAR, _SHEAR),
    (lambda image, degrees: _affine(image, shear_y=degrees), -_SHEAR, _SHEAR),
    (F.solarize, 0.0, 256.0),
    (lambda image, share: _affine(image, shift_x=share), -0.3, 0.3),
    (lambda image, share: _affine(image, shift_y=share), -0.3, 0.3),
)


def _draw(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _random_operation(image: Image.Image) -> Image.Image:
    operation, low, high = OPERATIONS[int(torch.randint(len(OPERATIONS), ()))]
    return operation(image, _draw(low, high))


class RandAugment2:
    """``n`` random operations, each applied with probability ``p``, each with a random strength."""

    def __init__(self, n: int = 2, p: float = 0.6) -> None:
        self.n, self.p = n, p

    def __call__(self, image: Image.Image) -> Image.Image:
        for _ in range(self.n):
            if torch.rand(()) < self.p:
                image = _random_operation(image)
        return image

    def __repr__(self) -> str:
        return f"RandAugment2(n={self.n}, p={self.p})"


class RandAugmentFixMatch:
    """FixMatch's strong augmentation: ``n`` random operations of random strength, then one gray square."""

    def __init__(self, n: int = 2) -> None:
        self.n = n

    def __call__(self, image: Image.Image) -> Image.Image:
        for _ in range(self.n):
            image = _random_operation(image)
        return self._cut(image)

    def _cut(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        side = _draw(0.0, 0.5) * min(width, height)
        x, y = _draw(0.0, width), _draw(0.0, height)
        image = image.copy()
        box = [max(x - side / 2, 0), max(y - side / 2, 0), min(x + side / 2, width), min(y + side / 2, height)]
        ImageDraw.Draw(image).rectangle(box, fill=(127, 127, 127))
        return image

    def __repr__(self) -> str:
        return f"RandAugmentFixMatch(n={self.n})"


def __getattr__(name: str) -> Any:  # names that upstream's module offers, too
    return upstream_name(__name__, name)

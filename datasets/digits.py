"""Digits: scikit-learn's 1,797 real handwritten digits (UCI, 8 x 8 pixels, 16 gray levels) as 64 x 64 PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dassl.data.datasets import DATASET_REGISTRY

from .cache import build_once, made_dataset_dir
from .split_dataset import SplitDataset
from .splits import Split, split_by_folder

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE_SIZE = 64  # pixels per side, the tiny CLIP's input size
GRAY_LEVELS = 16  # pixel values of the source go from 0 (background) to 16 (stroke)


def digit_image(pixels: np.ndarray, size: int = IMAGE_SIZE) -> Image.Image:
    """Convert an 8 x 8 array with values 0..16 to a gray image: bright strokes on black, enlarged bicubically."""
    gray = np.rint(np.asarray(pixels) * (255.0 / GRAY_LEVELS)).astype(np.uint8)
    return Image.fromarray(gray).resize((size, size), Image.Resampling.BICUBIC)


def write_digits(folder: Path) -> None:
    """Write each digit as `folder/images/<digit>/<number in the source>.png`."""
    from sklearn.datasets import load_digits  # here, not above: scikit-learn is slow to import and rarely needed

    source = load_digits()
    for number, (pixels, label) in enumerate(zip(source.images, source.target, strict=True)):
        path = folder / "images" / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        digit_image(pixels).save(path)


@DATASET_REGISTRY.register()
class Digits(SplitDataset):
    """Ten classes, zero to nine; 50 / 20 / 30 % of each for train / val / test. Made on first use, needs no --root."""

    folder = "digits"

    def locate(self, root: str) -> Path:
        return build_once(made_dataset_dir(root, self.folder), write_digits)

    def make_split(self) -> Split:
        return split_by_folder(self.image_dir, renamed={str(digit): name for digit, name in enumerate(CLASSES)})

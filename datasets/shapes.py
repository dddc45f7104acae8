"""Shapes: 40 fine-grained classes of rendered shapes, and four shifted test sets that mirror the ImageNet family.

    Shapes        100 images a class, split 50 / 20 / 30
    ShapesV2      the same recipe drawn anew, smaller and more tilted      (ImageNetV2)
    ShapesSketch  thin black pen on white, an unsteady hand                (ImageNet-Sketch)
    ShapesA       occluded, cluttered, noisy; every second class           (ImageNet-A)
    ShapesR       negatives, coarse pixels, emboss, ...; the other classes (ImageNet-R)

All are made on first use from fixed seeds and need no --root. Their colors and textures are a subset of those that the
renderer has, so that a generic set can be made with others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from yacs.config import CfgNode

from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum

from .cache import build_once, made_dataset_dir
from .rendering import SHAPE_CLASSES, Style, compose, outline_mask, random_style
from .split_dataset import SplitDataset, check_shots
from .splits import Split, split_by_folder, subsample_classes

CLASSES = tuple(SHAPE_CLASSES)
FOLDERS = tuple(f"{label:02d}_{name.replace(' ', '_')}" for label, name in enumerate(CLASSES))
COLORS = ("red", "green", "blue", "yellow", "purple", "brown", "white", "black")
TEXTURES = ("plain", "striped", "outlined", "shaded")
IMAGES_PER_CLASS = 100
SHIFTED_PER_CLASS = 25

Rng = np.random.Generator


def draw_plain(name: str, rng: Rng) -> Image.Image:
    """Draw a member of `Shapes`, 64 x 64 RGB."""
    style = random_style(rng, COLORS, TEXTURES, noise=0.1, clutter=3)
    return Image.fromarray(compose(outline_mask(name, rng, scale=(0.4, 0.85)), style, rng))


def draw_v2(name: str, rng: Rng) -> Image.Image:
    """Draw a member of `ShapesV2`: like one of `Shapes`, but smaller and more tilted."""
    style = random_style(rng, COLORS, TEXTURES, noise=0.1, clutter=3)
    return Image.fromarray(compose(outline_mask(name, rng, scale=(0.35, 0.65), tilt=40), style, rng))


def draw_sketch(name: str, rng: Rng) -> Image.Image:
    """Draw a member of `ShapesSketch`: black pen on white, with a wavering line."""
    mask = outline_mask(name, rng, scale=(0.55, 0.9))
    y, x = np.mgrid[0:64, 0:64]
    wobble = 1.2 * np.sin(np.stack([y, x]) * rng.uniform(0.2, 0.5, (2, 1, 1)) + rng.uniform(0, 6.3, (2, 1, 1)))
    columns, rows = (np.clip(np.rint(v + w), 0, 63).astype(int) for v, w in zip((x, y), wobble, strict=True))
    style = Style(color="black", background="white", texture="outlined", noise=0.01)
    return ImageOps.grayscale(Image.fromarray(compose(mask[rows, columns], style, rng))).convert("RGB")


def draw_adversarial(name: str, rng: Rng) -> Image.Image:
    """Draw a member of `ShapesA`: half hidden by a bar, among blobs, in noise."""
    style = random_style(rng, COLORS, TEXTURES, noise=0.15, clutter=9, occlusion=0.22)
    return Image.fromarray(compose(outline_mask(name, rng, scale=(0.4, 0.85)), style, rng))


def draw_rendition(name: str, rng: Rng) -> Image.Image:
    """Draw a member of `ShapesR`: one of six renditions of a member of `Shapes`."""
    image = draw_plain(name, rng)
    renditions: tuple[Callable[[], Image.Image], ...] = (
        lambda: ImageOps.invert(image),
        lambda: image.resize((20, 20), Image.Resampling.BOX).resize((64, 64), Image.Resampling.NEAREST),
        lambda: ImageOps.posterize(image, 2),
        lambda: image.filter(ImageFilter.EMBOSS),
        lambda: image.filter(ImageFilter.FIND_EDGES),
        lambda: image.convert("1").convert("RGB"),
    )
    return renditions[rng.integers(len(renditions))]()


def write_images(
    folder: Path, draw: Callable[[str, Rng], Image.Image], labels: range, per_class: int, seed: int
) -> None:
    """Render all images as `folder/images/<label>_<class>/<number>.png`; each class has its own generator."""
    for label in labels:
        rng = np.random.default_rng((seed, label))
        place = folder / "images" / FOLDERS[label]
        place.mkdir(parents=True)
        for number in range(per_class):
            draw(CLASSES[label], rng).save(place / f"{number:03d}.png")


def drawn_shapes(root: str) -> Path:
    """Return the folder of `Shapes`' images for a DATASET.ROOT; they are drawn where it is not there."""
    return build_once(
        made_dataset_dir(root, Shapes.folder),
        lambda folder: write_images(folder, draw_plain, range(len(CLASSES)), IMAGES_PER_CLASS, seed=1),
    )


@DATASET_REGISTRY.register()
class Shapes(SplitDataset):
    """40 classes of rendered shapes, 50 / 20 / 30 images a class for train / val / test."""

    folder = "shapes"

    def locate(self, root: str) -> Path:
        return drawn_shapes(root)

    def make_split(self) -> Split:
        return split_by_folder(self.image_dir, renamed=dict(zip(FOLDERS, CLASSES, strict=True)))


class ShiftedShapes(DatasetBase):
    """A test set over (some of) the classes of `Shapes`.

    Attributes:
        class_indices: for each class its label in `Shapes`: a classifier trained there can be cut to these classes.
        test_only: nothing may be trained here; `train_x` equals `test` and only carries the class names, as in
            CoOp's readers.
    """

    folder: ClassVar[str]
    labels: ClassVar[range] = range(len(CLASSES))
    seed: ClassVar[int]
    draw: ClassVar[staticmethod[[str, Rng], Image.Image]]
    test_only = True

    def __init__(self, cfg: CfgNode) -> None:
        check_shots(cfg.DATASET.NUM_SHOTS)
        cls = type(self)
        self.dataset_dir = str(
            build_once(
                made_dataset_dir(cfg.DATASET.ROOT, self.folder),
                lambda folder: write_images(folder, cls.draw, self.labels, SHIFTED_PER_CLASS, self.seed),
            )
        )
        test = [
            Datum(
                impath=f"{self.dataset_dir}/images/{FOLDERS[label]}/{number:03d}.png",
                label=rank,
                classname=CLASSES[label],
            )
            for rank, label in enumerate(self.labels)
            for number in range(SHIFTED_PER_CLASS)
        ]
        (test,) = subsample_classes(test, subsample=cfg.DATASET.SUBSAMPLE_CLASSES)
        self.class_indices = [CLASSES.index(name) for name in dict.fromkeys(item.classname for item in test)]
        super().__init__(train_x=test, test=test)


@DATASET_REGISTRY.register()
class ShapesV2(ShiftedShapes):
    """`Shapes` drawn anew, smaller and more tilted."""

    folder, seed, draw = "shapes_v2", 2, staticmethod(draw_v2)


@DATASET_REGISTRY.register()
class ShapesSketch(ShiftedShapes):
    """Black pen on white."""

    folder, seed, draw = "shapes_sketch", 3, staticmethod(draw_sketch)


@DATASET_REGISTRY.register()
class ShapesA(ShiftedShapes):
    """Occluded and cluttered; the 20 classes with even labels."""

    folder, seed, labels, draw = "shapes_a", 4, range(0, len(CLASSES), 2), staticmethod(draw_adversarial)


@DATASET_REGISTRY.register()
class ShapesR(ShiftedShapes):
    """Other renditions; the 20 classes with odd labels."""

    folder, seed, labels, draw = "shapes_r", 5, range(1, len(CLASSES), 2), staticmethod(draw_rendition)

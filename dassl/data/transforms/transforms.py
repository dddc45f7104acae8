"""Build transforms by name: torchvision's where it has them, our own where it has none.

The order of the names in the config does not matter; what is applied in which order is written down once, in
``_train_steps`` and ``_test_steps``. Random draws use torch's generator only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from dassl.config import CfgNode
from dassl.upstream_names import upstream_name
from dassl.utils import InputError, check_availability
from dassl.utils.logger import DETAIL

from .randaugment import RandAugment2, RandAugmentFixMatch

logger = logging.getLogger(__name__)

AVAI_CHOICES = [
    "random_flip",
    "random_resized_crop",
    "normalize",
    "instance_norm",
    "random_crop",
    "random_translation",
    "center_crop",  # no effect: always on in test, never in training
    "cutout",
    "imagenet_policy",
    "cifar10_policy",
    "svhn_policy",
    "randaugment",
    "randaugment_fixmatch",
    "randaugment2",
    "gaussian_noise",
    "colorjitter",
    "randomgrayscale",
    "gaussian_blur",
]

INTERPOLATION_MODES = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "nearest": InterpolationMode.NEAREST,
}

DECODINGS = ["full", "reduced"]


class Random2DTranslation:
    """Enlarge a PIL image to 9/8 of the target size and cut the target out, with probability p; else only resize it."""

    def __init__(self, height: int, width: int, p: float = 0.5) -> None:
        self.height, self.width, self.p = height, width, p

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(()) >= self.p:
            return image.resize((self.width, self.height), Image.Resampling.BILINEAR)
        width, height = round(self.width * 1.125), round(self.height * 1.125)
        left = int(torch.randint(width - self.width + 1, ()))
        top = int(torch.randint(height - self.height + 1, ()))
        enlarged = image.resize((width, height), Image.Resampling.BILINEAR)
        return enlarged.crop((left, top, left + self.width, top + self.height))

    def __repr__(self) -> str:
        return f"Random2DTranslation({self.height}, {self.width}, p={self.p})"


class Cutout:
    """Zero ``n_holes`` squares of side ``length`` pixels, centered anywhere, in an image tensor [C, H, W]."""

    def __init__(self, n_holes: int = 1, length: int = 16) -> None:
        self.n_holes, self.length = n_holes, length

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        image = image.clone()
        for _ in range(self.n_holes):
            y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
            top, left = y - self.length // 2, x - self.length // 2
            image[..., max(top, 0) : max(top + self.length, 0), max(left, 0) : max(left + self.length, 0)] = 0
        return image

    def __repr__(self) -> str:
        return f"Cutout(n_holes={self.n_holes}, length={self.length})"


class GaussianNoise:
    """With probability p, add noise of the given mean and standard deviation to an image tensor."""

    def __init__(self, mean: float = 0.0, std: float = 0.15, p: float = 0.5) -> None:
        self.mean, self.std, self.p = mean, std, p

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if torch.rand(()) >= self.p:
            return image
        return image + torch.randn(image.shape) * self.std + self.mean

    def __repr__(self) -> str:
        return f"GaussianNoise(mean={self.mean}, std={self.std}, p={self.p})"


class InstanceNormalization:
    """Normalize each channel of an image tensor [C, H, W] to mean 0 and standard deviation 1 over its own pixels."""

    def __init__(self, eps: float = 1e-8) -> None:
        self.eps = eps

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        mean = image.mean(dim=(1, 2), keepdim=True)  # [C, 1, 1]
        std = image.std(dim=(1, 2), keepdim=True)
        return (image - mean) / (std + self.eps)

    def __repr__(self) -> str:
        return f"InstanceNormalization(eps={self.eps})"


def to_float_tensor() -> list[Any]:
    """Return the steps that turn a PIL image into a float tensor [C, H, W] with values in [0, 1]."""
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]


def build_transform(cfg: CfgNode, is_train: bool = True, choices: Sequence[str] | None = None) -> v2.Compose | None:
    """Build the transform from PIL image to tensor [3, H, W] that ``cfg.INPUT`` describes.

    Args:
        cfg: the run's config.
        is_train: the random training transform, or the fixed test transform.
        choices: names of transforms; None: INPUT.TRANSFORMS.

    Returns:
        The transform; None when INPUT.NO_TRANSFORM is set.

    Raises:
        InputError: an unknown name or interpolation, a size that is not two positive numbers, a mean, standard
            deviation or crop scale that cannot be one.
    """
    if cfg.INPUT.NO_TRANSFORM:
        logger.info("Note: no transform is applied")
        return None
    names = cfg.INPUT.TRANSFORMS if choices is None else choices
    if isinstance(names, str):
        names = [names]
    for name in names:
        check_availability(name, AVAI_CHOICES)
    check_availability(cfg.INPUT.INTERPOLATION, list(INTERPOLATION_MODES))
    check_numbers(cfg)
    steps = list(_train_steps(cfg, set(names)) if is_train else _test_steps(cfg, set(names)))
    if cfg.VERBOSE:
        logger.info("Building transform_%s", "train" if is_train else "test", extra=DETAIL)
        for step in steps:
            logger.info("+ %s", step, extra=DETAIL)
    return v2.Compose(steps)


def least_side(cfg: CfgNode, is_train: bool) -> int:
    """Return the pixels that the shorter side of an image must have for the transforms of ``cfg.INPUT``.

    It is twice what the model sees, so that resizing to that still averages over pixels. Only random crops of less than
    a quarter of the area can then show less detail than the file has.

    Args:
        cfg: the run's config.
        is_train: whether it is for the training transform.

    Returns:
        The number of pixels; 0: images must be whole, as INPUT.DECODE says or because their own pixels are cut out.

    Raises:
        InputError: INPUT.DECODE is neither full nor reduced.
    """
    node = cfg.INPUT
    how = node.get("DECODE", "full")
    check_availability(how, DECODINGS)
    if how == "full" or node.NO_TRANSFORM:
        return 0
    if is_train and "random_crop" in node.TRANSFORMS:
        return 0
    return 2 * int(max(node.SIZE))


def check_numbers(cfg: CfgNode) -> None:
    """Check the numbers of INPUT that transforms and datasets take.

    Raises:
        InputError: a size, mean, standard deviation or crop scale that cannot be one.
    """
    node = cfg.INPUT
    size, scale = node.SIZE, node.RRCROP_SCALE
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise InputError(f"Expected INPUT.SIZE to be (height, width) in pixels but got {size}")
    for key, low in (("PIXEL_MEAN", -math.inf), ("PIXEL_STD", 0.0)):
        values = node[key]
        if len(values) != 3 or not all(_is_number(value) and value > low for value in values):
            above = "numbers above 0" if low == 0 else "numbers"
            raise InputError(f"Expected INPUT.{key} to be three {above}, one per color channel, but got {values}")
    if len(scale) != 2 or not all(map(_is_number, scale)) or not 0 < scale[0] <= scale[1] <= 1:
        raise InputError(f"Expected INPUT.RRCROP_SCALE to be (smallest, largest) share of the area but got {scale}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _train_steps(cfg: CfgNode, names: set[str]) -> Iterable[Any]:
    node = cfg.INPUT
    size = tuple(node.SIZE)
    mode = INTERPOLATION_MODES[node.INTERPOLATION]
    # Geometry. Without a crop both sides of the image are resized to INPUT.SIZE, whatever its shape.
    if not names & {"random_crop", "random_resized_crop"}:
        yield v2.Resize(size, interpolation=mode)
    if "random_translation" in names:
        yield Random2DTranslation(*size)
    if "random_crop" in names:
        yield v2.RandomCrop(size, padding=node.CROP_PADDING, pad_if_needed=True)
    if "random_resized_crop" in names:
        yield v2.RandomResizedCrop(size, scale=tuple(node.RRCROP_SCALE), interpolation=mode)
    if "random_flip" in names:
        yield v2.RandomHorizontalFlip()
    # Policies.
    for name, policy in (
        ("imagenet_policy", v2.AutoAugmentPolicy.IMAGENET),
        ("cifar10_policy", v2.AutoAugmentPolicy.CIFAR10),
        ("svhn_policy", v2.AutoAugmentPolicy.SVHN),
    ):
        if name in names:
            yield v2.AutoAugment(policy)
    if "randaugment" in names:
        yield v2.RandAugment(node.RANDAUGMENT_N, node.RANDAUGMENT_M)
    if "randaugment_fixmatch" in names:
        yield RandAugmentFixMatch(node.RANDAUGMENT_N)
    if "randaugment2" in names:
        yield RandAugment2(node.RANDAUGMENT_N)
    # Colors.
    if "colorjitter" in names:
        yield v2.ColorJitter(node.COLORJITTER_B, node.COLORJITTER_C, node.COLORJITTER_S, node.COLORJITTER_H)
    if "randomgrayscale" in names:
        yield v2.RandomGrayscale(node.RGS_P)
    if "gaussian_blur" in names:
        yield v2.RandomApply([v2.GaussianBlur(node.GB_K)], p=node.GB_P)
    # Tensors.
    yield from to_float_tensor()
    if "cutout" in names:
        yield Cutout(node.CUTOUT_N, node.CUTOUT_LEN)
    if "normalize" in names:
        yield v2.Normalize(mean=list(node.PIXEL_MEAN), std=list(node.PIXEL_STD))
    if "gaussian_noise" in names:
        yield GaussianNoise(node.GN_MEAN, node.GN_STD)
    if "instance_norm" in names:
        yield InstanceNormalization()


def _test_steps(cfg: CfgNode, names: set[str]) -> Iterable[Any]:
    node = cfg.INPUT
    mode = INTERPOLATION_MODES[node.INTERPOLATION]
    if node.get("SQUASH", False):
        yield v2.Resize(tuple(node.SIZE), interpolation=mode)
    else:
        yield v2.Resize(max(node.SIZE), interpolation=mode)  # the shorter side
        yield v2.CenterCrop(tuple(node.SIZE))
    yield from to_float_tensor()
    if "normalize" in names:
        yield v2.Normalize(mean=list(node.PIXEL_MEAN), std=list(node.PIXEL_STD))
    if "instance_norm" in names:
        yield InstanceNormalization()


def __getattr__(name: str) -> Any:  # names that upstream's module offers, too
    return upstream_name(__name__, name)

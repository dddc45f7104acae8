"""AutoAugment's learned policies (Cubuk et al., 2019), from torchvision, under upstream's names."""

from __future__ import annotations

from collections.abc import Sequence

from torchvision.transforms import v2

__all__ = ["CIFAR10Policy", "ImageNetPolicy", "SVHNPolicy"]


class ImageNetPolicy(v2.AutoAugment):
    """The policy learned on ImageNet, from PIL image to PIL image.

    ``fillcolor`` (RGB, 0..255) fills the areas that a geometric operation leaves empty.
    """

    def __init__(self, fillcolor: Sequence[float] = (128, 128, 128)) -> None:
        super().__init__(v2.AutoAugmentPolicy.IMAGENET, fill=list(fillcolor))


class CIFAR10Policy(v2.AutoAugment):
    """The policy learned on CIFAR-10."""

    def __init__(self, fillcolor: Sequence[float] = (128, 128, 128)) -> None:
        super().__init__(v2.AutoAugmentPolicy.CIFAR10, fill=list(fillcolor))


class SVHNPolicy(v2.AutoAugment):
    """The policy learned on SVHN."""

    def __init__(self, fillcolor: Sequence[float] = (128, 128, 128)) -> None:
        super().__init__(v2.AutoAugmentPolicy.SVHN, fill=list(fillcolor))

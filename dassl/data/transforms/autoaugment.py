"""AutoAugment's learnt policies (Cubuk et al., 2019), from torchvision, under upstream's names."""

from __future__ import annotations

from collections.abc import Sequence

from torchvision.transforms import v2

__all__ = ["CIFAR10Policy", "ImageNetPolicy", "SVHNPolicy"]


class ImageNetPolicy(v2.AutoAugment):
    """The policy learnt on ImageNet: PIL image -> PIL image; ``fillcolor`` (RGB, 0..255) fills what moves in."""

    def __init__(self, fillcolor: Sequence[float] = (128, 128, 128)) -> None:
        super().__init__(v2.AutoAugmentPolicy.IMAGENET, fill=list(fillcolor))


class CIFAR10Policy(v2.AutoAugment):
    """The policy learnt on CIFAR-10."""

    def __init__(self, fillcolor: Sequence[float] = (128, 128, 128)) -> None:
        super().__init__(v2.AutoAugmentPolicy.CIFAR10, fill=list(fillcolor))


class SVHNPolicy(v2.AutoAugment):
    """The policy learnt on SVHN."""

    def __init__(self, fillcolor: Sequence[float] = (128, 128, 128)) -> None:
        super().__init__(v2.AutoAugmentPolicy.SVHN, fill=list(fillcolor))

"""ImageNetA: photographs that fool ResNet-50 (Hendrycks et al., 2021)."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from .imagenet_shifted import ShiftedImageNet


@DATASET_REGISTRY.register()
class ImageNetA(ShiftedImageNet):
    """200 of ImageNet's classes."""

    folder = "imagenet-adversarial"
    images = "imagenet-a"

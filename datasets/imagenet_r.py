"""ImageNetR: paintings, toys, tattoos and other renditions (Hendrycks et al., 2021)."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from .imagenet_shifted import ShiftedImageNet


@DATASET_REGISTRY.register()
class ImageNetR(ShiftedImageNet):
    """200 of ImageNet's classes."""

    folder = "imagenet-rendition"
    images = "imagenet-r"

"""ImageNetSketch: sketches of ImageNet's classes (Wang et al., 2019)."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from .imagenet_shifted import ShiftedImageNet


@DATASET_REGISTRY.register()
class ImageNetSketch(ShiftedImageNet):
    """1,000 classes, about 50 sketches each."""

    folder = "imagenet-sketch"
    images = "images"
    all_classes = True

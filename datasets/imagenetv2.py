"""ImageNetV2: new test images for ImageNet, collected like the old ones (Recht et al., 2019), matched frequency."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from .imagenet_shifted import ShiftedImageNet


@DATASET_REGISTRY.register()
class ImageNetV2(ShiftedImageNet):
    """1,000 classes, 10 images each; the folders are called 0 to 999, ImageNet's labels."""

    folder = "imagenetv2"
    images = "imagenetv2-matched-frequency-format-val"
    all_classes = True

    def class_folders(self, wnids: list[str]) -> list[str]:
        return [str(label) for label in range(len(wnids))]

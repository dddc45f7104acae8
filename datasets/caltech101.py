"""Caltech101: 100 kinds of objects and things (Li et al., 2004), without the background and the second face folder."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from .split_dataset import SplitDataset
from .splits import Split, split_by_folder

IGNORED = ("BACKGROUND_Google", "Faces_easy")
RENAMED = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}


@DATASET_REGISTRY.register()
class Caltech101(SplitDataset):
    """One folder per class; labels follow the folders' names, capitals first."""

    folder = "caltech-101"
    images = "101_ObjectCategories"
    split_name = "split_zhou_Caltech101.json"
    sources = ("101_ObjectCategories",)

    def make_split(self) -> Split:
        return split_by_folder(self.image_dir, ignored=IGNORED, renamed=RENAMED)

"""Food101: 101 dishes, 1,000 images each (Bossard et al., 2014)."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from .split_dataset import SplitDataset
from .splits import Split, split_by_folder


@DATASET_REGISTRY.register()
class Food101(SplitDataset):
    """One folder per class; the official train/test lists are not used, as in CoOp."""

    folder = "food-101"
    split_name = "split_zhou_Food101.json"
    sources = ("images",)

    def make_split(self) -> Split:
        return split_by_folder(self.image_dir)

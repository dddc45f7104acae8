"""DescribableTextures: 47 textures, 120 images each (Cimpoi et al., 2014)."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from .coop_style import FolderTools
from .split_dataset import SplitDataset
from .splits import Split, split_by_folder


@DATASET_REGISTRY.register()
class DescribableTextures(FolderTools, SplitDataset):
    """One folder per class; the ten official splits (`labels/`, `imdb/`) are not used, as in CoOp."""

    folder = "dtd"
    split_name = "split_zhou_DescribableTextures.json"
    sources = ("images",)

    def make_split(self) -> Split:
        return split_by_folder(self.image_dir)

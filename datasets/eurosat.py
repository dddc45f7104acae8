"""EuroSAT: 10 kinds of land use seen by Sentinel-2, RGB version, 27,000 images (Helber et al., 2019)."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY

from .split_dataset import SplitDataset
from .splits import Split, split_by_folder

RENAMED = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}


@DATASET_REGISTRY.register()
class EuroSAT(SplitDataset):
    """One folder per class, shown under a longer name."""

    folder = "eurosat"
    images = "2750"
    split_name = "split_zhou_EuroSAT.json"
    sources = ("2750",)

    def make_split(self) -> Split:
        return split_by_folder(self.image_dir, renamed=RENAMED)

"""OxfordFlowers: 102 flowers common in the United Kingdom (Nilsback and Zisserman, 2008)."""

from __future__ import annotations

import random

from dassl.data.datasets import DATASET_REGISTRY, Datum
from dassl.utils import InputError, read_json

from .files import read_mat
from .split_dataset import SplitDataset
from .splits import SPLIT_SEED, Split, cut_shares


@DATASET_REGISTRY.register()
class OxfordFlowers(SplitDataset):
    """Image number i has the i-th label of `imagelabels.mat`; the official split (`setid.mat`) is not used."""

    folder = "oxford_flowers"
    images = "jpg"
    split_name = "split_zhou_OxfordFlowers.json"
    sources = ("imagelabels.mat", "cat_to_name.json", "jpg")

    def make_split(self) -> Split:
        """Split each class into 50 / 20 / 30 %.

        Classes come in the order of their first image, which is not that of their labels.
        """
        names = read_json(f"{self.dataset_dir}/cat_to_name.json")
        by_label: dict[int, list[Datum]] = {}
        for number, value in enumerate(read_mat(f"{self.dataset_dir}/imagelabels.mat", "labels").flatten(), start=1):
            label = int(value) - 1
            name = names.get(str(int(value))) if isinstance(names, dict) else None
            if not isinstance(name, str):
                raise InputError(
                    f"Expected {self.dataset_dir}/cat_to_name.json to name class {int(value)} of imagelabels.mat but "
                    f"got {name!r}"
                )
            path = f"{self.image_dir}/image_{number:05d}.jpg"
            by_label.setdefault(label, []).append(Datum(impath=path, label=label, classname=name))
        rng = random.Random(SPLIT_SEED)
        split = Split([], [], [])
        for data in by_label.values():
            rng.shuffle(data)
            cut_shares(data, split, f"class {data[0].classname!r} of {self.dataset_dir}")
        return split

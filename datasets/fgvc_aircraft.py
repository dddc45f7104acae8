"""FGVCAircraft: 100 variants of aircraft (Maji et al., 2013)."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY, Datum
from dassl.utils import InputError

from .files import read_lines, read_table
from .split_dataset import SplitDataset
from .splits import Split


@DATASET_REGISTRY.register()
class FGVCAircraft(SplitDataset):
    """The official train, val and test lists of variants, whose names hold spaces and slashes (`F-16A/B`).

    Labels follow the lines of `variants.txt`. Images are used whole, with the copyright line at their foot, as in CoOp.
    """

    folder = "fgvc_aircraft"
    split_name = ""  # the lists are the split
    sources = (
        "variants.txt",
        "images_variant_train.txt",
        "images_variant_val.txt",
        "images_variant_test.txt",
        "images",
    )

    def make_split(self) -> Split:
        labels = {name: label for label, name in enumerate(read_lines(f"{self.dataset_dir}/variants.txt"))}
        return Split(*(self._read(f"images_variant_{part}.txt", labels) for part in ("train", "val", "test")))

    def _read(self, name: str, labels: dict[str, int]) -> list[Datum]:
        data = []
        for image, variant in read_table(f"{self.dataset_dir}/{name}", str, str):
            if variant not in labels:
                raise InputError(
                    f"Expected the variants of {self.dataset_dir}/{name} to be in variants.txt but got {variant!r}"
                )
            data.append(Datum(impath=f"{self.image_dir}/{image}.jpg", label=labels[variant], classname=variant))
        return data

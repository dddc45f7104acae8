"""OxfordPets: 37 breeds of cats and dogs (Parkhi et al., 2012)."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY, Datum

from .coop_style import SplitTools
from .files import read_table
from .split_dataset import SplitDataset
from .splits import Split, split_trainval


@DATASET_REGISTRY.register()
class OxfordPets(SplitTools, SplitDataset):
    """The official trainval and test lists; class names are in the images' names: `Abyssinian_100` -> `abyssinian`."""

    folder = "oxford_pets"
    split_name = "split_zhou_OxfordPets.json"
    sources = ("annotations/trainval.txt", "annotations/test.txt", "images")

    def make_split(self) -> Split:
        train, val = split_trainval(self._read("trainval.txt"))
        return Split(train, val, self._read("test.txt"))

    def _read(self, name: str) -> list[Datum]:
        # Lines: image, class (from 1), species, breed within the species.
        return [
            Datum(
                impath=f"{self.image_dir}/{image}.jpg",
                label=number - 1,
                classname=image.rpartition("_")[0].lower(),
            )
            for image, number, _, _ in read_table(f"{self.dataset_dir}/annotations/{name}", str, int, int, int)
        ]

"""StanfordCars: 196 makes, models and years of cars (Krause et al., 2013)."""

from __future__ import annotations

from typing import Any

from dassl.data.datasets import DATASET_REGISTRY, Datum
from dassl.utils import InputError

from .files import read_mat
from .split_dataset import SplitDataset
from .splits import Split, split_trainval

TRAIN = "devkit/cars_train_annos.mat"
TEST = "cars_test_annos_withlabels.mat"  # beside the devkit, whose own test file has no labels
META = "devkit/cars_meta.mat"


def year_first(name: str) -> str:
    """Move the year to the front of a name: `Audi TTS Coupe 2012` -> `2012 Audi TTS Coupe`."""
    *words, year = name.split(" ")
    return " ".join([year, *words])


@DATASET_REGISTRY.register()
class StanfordCars(SplitDataset):
    """The official train and test annotations. Paths in the split file start at the dataset's folder."""

    folder = "stanford_cars"
    images = ""
    split_name = "split_zhou_StanfordCars.json"
    sources = (TRAIN, TEST, META, "cars_train", "cars_test")

    def make_split(self) -> Split:
        names = [str(name[0]) for name in read_mat(f"{self.dataset_dir}/{META}", "class_names").flatten()]
        train, val = split_trainval(self._read(TRAIN, "cars_train", names))
        return Split(train, val, self._read(TEST, "cars_test", names))

    def _read(self, file: str, folder: str, names: list[str]) -> list[Datum]:
        data = []
        path = f"{self.dataset_dir}/{file}"
        for number, annotation in enumerate(read_mat(path, "annotations").flatten()):
            image, label = self._fields(path, number, annotation)
            if not 0 <= label < len(names):
                raise InputError(
                    f"Expected the classes of {path} to be 1 to {len(names)} but got {label + 1} ({image})"
                )
            data.append(
                Datum(impath=f"{self.dataset_dir}/{folder}/{image}", label=label, classname=year_first(names[label]))
            )
        return data

    def _fields(self, path: str, number: int, annotation: Any) -> tuple[str, int]:
        try:
            return str(annotation["fname"][0]), int(annotation["class"][0, 0]) - 1
        except (
            ValueError,
            IndexError,
            KeyError,
            TypeError,
        ) as error:  # a field that is absent is a ValueError of NumPy's
            raise InputError(
                f"Expected annotation {number} of {path} to have fname and class but got: {error}"
            ) from error

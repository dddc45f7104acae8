"""SUN397: 397 kinds of scenes (Xiao et al., 2010), the first of the ten official partitions."""

from __future__ import annotations

from dassl.data.datasets import DATASET_REGISTRY, Datum
from dassl.utils import InputError

from .files import read_lines
from .split_dataset import SplitDataset
from .splits import Split, split_trainval


def scene_name(path: str) -> str:
    """Return a class's name for its path, without the letter and with the narrower part first.

    Example: `a/apartment_building/outdoor` -> `outdoor apartment_building`.
    """
    return " ".join(reversed(path.split("/")[1:]))


@DATASET_REGISTRY.register()
class SUN397(SplitDataset):
    """Labels follow the lines of `ClassName.txt`; lists hold paths such as `/a/abbey/sun_aaalbzqrimafwbiv.jpg`."""

    folder = "sun397"
    images = "SUN397"
    split_name = "split_zhou_SUN397.json"
    sources = ("ClassName.txt", "Training_01.txt", "Testing_01.txt", "SUN397")

    def make_split(self) -> Split:
        classes = [line.removeprefix("/") for line in read_lines(f"{self.dataset_dir}/ClassName.txt")]
        labels = {path: label for label, path in enumerate(classes)}
        train, val = split_trainval(self._read("Training_01.txt", labels))
        return Split(train, val, self._read("Testing_01.txt", labels))

    def _read(self, name: str, labels: dict[str, int]) -> list[Datum]:
        data = []
        for line in read_lines(f"{self.dataset_dir}/{name}"):
            image = line.removeprefix("/")
            scene = image.rpartition("/")[0]
            if scene not in labels:
                raise InputError(
                    f"Expected the classes of {self.dataset_dir}/{name} to be in ClassName.txt but got {line!r}"
                )
            data.append(Datum(impath=f"{self.image_dir}/{image}", label=labels[scene], classname=scene_name(scene)))
        return data

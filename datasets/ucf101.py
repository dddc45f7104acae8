"""UCF101: 101 human actions (Soomro et al., 2012), the middle frame of each video, the first official split."""

from __future__ import annotations

import re

from dassl.data.datasets import DATASET_REGISTRY, Datum
from dassl.utils import InputError

from .files import read_lines, read_table
from .split_dataset import SplitDataset
from .splits import Split, split_trainval


def action_name(action: str) -> str:
    """Return the name of a class and of its folder of frames: `ApplyEyeMakeup` -> `Apply_Eye_Makeup`."""
    return "_".join(re.findall("[A-Z][^A-Z]*", action)) or action


@DATASET_REGISTRY.register()
class UCF101(SplitDataset):
    """Labels are the numbers of `classInd.txt`; lists hold videos such as `YoYo/v_YoYo_g01_c01.avi`."""

    folder = "ucf101"
    images = "UCF-101-midframes"
    split_name = "split_zhou_UCF101.json"
    sources = (
        "ucfTrainTestlist/classInd.txt",
        "ucfTrainTestlist/trainlist01.txt",
        "ucfTrainTestlist/testlist01.txt",
        "UCF-101-midframes",
    )

    def make_split(self) -> Split:
        index = read_table(f"{self.dataset_dir}/ucfTrainTestlist/classInd.txt", int, str)
        labels = {action: number - 1 for number, action in index}
        train, val = split_trainval(self._read("trainlist01.txt", labels))
        return Split(train, val, self._read("testlist01.txt", labels))

    def _read(self, name: str, labels: dict[str, int]) -> list[Datum]:
        data = []
        path = f"{self.dataset_dir}/ucfTrainTestlist/{name}"
        for line in read_lines(path):
            action, _, video = line.split(" ")[0].partition("/")  # train lists add the class's number
            if action not in labels or not video:
                raise InputError(f"Expected the lines of {path} to be 'action/video' of classInd.txt but got {line!r}")
            frame = f"{self.image_dir}/{action_name(action)}/{video.removesuffix('.avi')}.jpg"
            data.append(Datum(impath=frame, label=labels[action], classname=action_name(action)))
        return data

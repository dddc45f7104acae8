"""A recorded pass over 23 items, shared out where torchrun's variables are set: python predictions_worker.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dassl.data.loaders import part_of
from dassl.evaluation.passes import Evaluation, run_pass
from dassl.evaluation.predictions import Recorder, save_predictions
from dassl.utils import distributed


class Items(Dataset):
    def __len__(self):
        return 23

    def __getitem__(self, index):
        drawn = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return {"x": drawn, "label": index % 6, "impath": f"/data/{index}.png"}


def main() -> None:
    distributed.connect()
    if distributed.launched():
        distributed.start(False, 2)
    recorder = Recorder(23, 10**6, seed=1)

    def forward(batch):
        recorder.tell(batch["impath"], {"alpha": batch["x"][:, :1]}, {"branch": batch["x"]})
        return {"a": batch["x"], "b": -batch["x"]}, batch["label"]

    loader = part_of(DataLoader(Items(), batch_size=4))
    run_pass(loader, forward, Evaluation("test", "a"), lambda logits, labels: None, recorder=recorder)
    predictions = recorder.finish("test", "a", "", {})
    assert predictions is not None
    name = f"{distributed.rank()}-of-{distributed.world_size()}"
    save_predictions(Path(sys.argv[1]) / name, predictions)
    distributed.stop()


if __name__ == "__main__":
    main()

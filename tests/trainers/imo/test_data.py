import os
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import PILToTensor

from dassl.config import get_cfg_default
from dassl.data.data_manager import seed_worker
from dassl.data.datasets import Datum
from trainers.imo import data
from trainers.imo.data import EpochBatches, MultiCrop, training_loader


def all_batches(n, size, seed, epoch, world, monkeypatch):
    found = []
    for rank in range(world):
        monkeypatch.setattr(data, "process_rank", lambda rank=rank: (rank, world))
        batches = EpochBatches(n, size, seed)
        batches.epoch = epoch
        found.append(list(batches))
        assert len(found[-1]) == len(batches)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batches_of_one(monkeypatch, world):
    (whole,) = all_batches(30, 8, 5, 2, 1, monkeypatch)
    parts = all_batches(30, 8, 5, 2, world, monkeypatch)
    assert [len(batch) for batch in whole] == [8, 8, 8]
    for step, batch in enumerate(whole):
        assert all(len(part[step]) == 8 // world for part in parts)
        assert sorted(row for part in parts for row in part[step]) == sorted(batch)


def test_rows_are_views_of_the_epoch_in_an_order_of_their_own(monkeypatch):
    (first,) = all_batches(12, 4, 5, 0, 1, monkeypatch)
    (third,) = all_batches(12, 4, 5, 2, 1, monkeypatch)
    assert sorted(sum(first, [])) == list(range(12)) and sorted(sum(third, [])) == list(range(24, 36))
    assert [row % 12 for row in sum(third, [])] != sum(first, [])
    (again,) = all_batches(12, 4, 5, 0, 1, monkeypatch)
    assert again == first
    assert all_batches(12, 4, 6, 0, 1, monkeypatch) != [first]


def test_few_images_are_one_batch(monkeypatch):
    assert [len(batch) for batch in all_batches(5, 8, 0, 0, 1, monkeypatch)[0]] == [5]
    assert [len(batch) for batch in all_batches(5, 8, 0, 0, 2, monkeypatch)[1]] == [2]


def test_uneven_shares_are_refused(monkeypatch):
    monkeypatch.setattr(data, "process_rank", lambda: (0, 3))
    with pytest.raises(ValueError, match=r"to be a multiple of their number \(3\) but got 8"):
        EpochBatches(100, 8, 0)


def crops(local=3, switches=("normalize",), **scales):
    scales = {"global_scale": (0.4, 1.0), "local_scale": (0.05, 0.4), **scales}
    make = MultiCrop((24, 24), local, switches=switches, mean=(0.5,) * 3, std=(0.25,) * 3, **scales)
    image = Image.linear_gradient("L").convert("RGB")
    return make(image)


def test_two_global_and_all_local_crops_have_the_model_s_size():
    torch.manual_seed(0)
    big, small = crops()
    assert big.shape == (2, 3, 24, 24) and small.shape == (3, 3, 24, 24)
    assert big.min() >= -2.01 and big.max() <= 2.01
    big, small = crops(local=0)
    assert big.shape == (2, 3, 24, 24) and small.shape == (0, 3, 24, 24)


def test_local_crops_see_less_of_the_image():
    """In a vertical gradient the range of values is the height that a crop sees."""
    torch.manual_seed(0)
    seen = [tuple((x.amax(dim=(1, 2, 3)) - x.amin(dim=(1, 2, 3))).mean() for x in crops()) for _ in range(10)]
    big, small = (torch.stack([pair[i] for pair in seen]).mean() for i in (0, 1))
    assert small < 0.7 * big


def test_every_augmentation_can_be_on():
    every = ("random_flip", "colorjitter", "randomgrayscale", "gaussian_blur", "solarize", "normalize")
    torch.manual_seed(0)
    big, small = crops(switches=every)
    assert torch.isfinite(big).all() and torch.isfinite(small).all()


def test_reader_processes_begin_as_the_toolbox_s(tmp_path):
    """They leave the process group: a signal to all of it is for the run, which wants its batch first."""
    path = str(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(path)
    like = SimpleNamespace(num_workers=1, worker_init_fn=seed_worker)
    loader = training_loader(get_cfg_default(), [Datum(impath=path)], PILToTensor(), seed=0, epochs=1, like=like)
    assert len(list(loader)) == 1
    (reader,) = loader._iterator._workers
    assert os.getpgid(reader.pid) == reader.pid != os.getpgid(0)

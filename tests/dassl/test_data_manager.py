"""Loaders: batches, reproducibility, the summary."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import RandomSampler, SequentialSampler

from dassl.config import get_cfg_default
from dassl.data import DataManager, DatasetWrapper
from dassl.data import data_manager as module
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.data.decoded_images import DecodedImages
from dassl.data.transforms import build_transform, least_side
from dassl.utils import InputError, read_image


@pytest.fixture
def files(tmp_path):
    """Twelve images, two classes."""
    output = []
    for number in range(12):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (20, 16), (number * 20, 0, 0)).save(path)
        output.append(Datum(str(path), number % 2, 0, ["cat", "dog"][number % 2]))
    return output


@pytest.fixture
def cfg(files, monkeypatch):
    """A config of the dataset Tiny: 10 training, 2 test images."""

    class Tiny(DatasetBase):
        def __init__(self, cfg):
            super().__init__(train_x=files[:10], test=files[10:])

    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "Tiny", Tiny)
    cfg = get_cfg_default()
    cfg.DATASET.NAME = "Tiny"
    cfg.SEED = 0
    cfg.INPUT.SIZE = (8, 8)
    cfg.INPUT.TRANSFORMS = ("normalize",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.TRAIN_X.BATCH_SIZE = 4
    return cfg


def order(loader):
    return [index for batch in loader for index in batch["index"].tolist()]


def with_unlabeled(cfg, files, monkeypatch):
    class Semi(DatasetBase):
        def __init__(self, cfg):
            super().__init__(train_x=files[:10], train_u=files[:10], val=files[10:11], test=files[11:])

    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "Semi", Semi)
    cfg.DATASET.NAME = "Semi"
    return cfg


class RandomNoise:
    """Draws from all three generators, as transforms of others may."""

    def __call__(self, image):
        import random

        return torch.tensor([random.random(), np.random.rand(), torch.rand(1).item()])


def test_loaders_and_summary(cfg, caplog):
    cfg.DATASET.SOURCE_DOMAINS = ("photo",)
    with caplog.at_level("INFO"):
        manager = DataManager(cfg)
    assert manager.num_classes == 2 and manager.lab2cname == {0: "cat", 1: "dog"} and manager.num_source_domains == 1
    assert manager.train_loader_u is None and manager.val_loader is None
    batches = list(manager.train_loader_x)
    assert [len(batch["label"]) for batch in batches] == [4, 4]  # the last two items are dropped
    batch = batches[0]
    assert batch["img"].shape == (4, 3, 8, 8) and batch["label"].dtype == torch.int64
    assert list(batch) == ["label", "domain", "impath", "index", "img"]
    assert order(manager.test_loader) == [0, 1]
    table = caplog.messages[-1]
    rows = [line.split("  ") for line in table.splitlines() if not line.startswith("-")]
    assert [row[0] for row in rows] == ["Dataset", "Source", "# classes", "# train_x", "# test"]
    assert rows[3][-1].strip() == "10"


def test_thousands_separators(cfg, caplog, monkeypatch):
    manager = DataManager(cfg)
    monkeypatch.setattr(manager.dataset, "_train_x", [None] * 12345)
    with caplog.at_level("INFO"):
        manager.show_dataset_summary(cfg)
    assert "12,345" in caplog.messages[-1]


def test_verbose_off(cfg, caplog):
    cfg.VERBOSE = False
    with caplog.at_level("INFO"):
        DataManager(cfg)
    assert caplog.messages == []


def test_a_single_small_batch_is_kept(cfg):
    cfg.DATALOADER.TRAIN_X.BATCH_SIZE = 64
    assert len(DataManager(cfg).train_loader_x) == 1


def test_order_depends_on_the_seed_only(cfg):
    first = order(DataManager(cfg).train_loader_x)
    torch.rand(7)
    manager = DataManager(cfg)
    torch.rand(7)
    assert order(manager.train_loader_x) == first
    assert order(manager.train_loader_x) != first
    cfg.SEED = 1
    assert order(DataManager(cfg).train_loader_x) != first


def test_unseeded_follows_torchs_generator(cfg):
    cfg.SEED = -1
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(order(DataManager(cfg).train_loader_x))
    assert found[0] == found[1] != found[2]


def test_set_epoch_lets_a_resumed_run_go_on(cfg):
    manager = DataManager(cfg)
    epochs = []
    for epoch in range(3):
        manager.set_epoch(epoch)
        epochs.append(order(manager.train_loader_x))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    resumed = DataManager(cfg)
    resumed.set_epoch(2)
    assert order(resumed.train_loader_x) == epochs[2]
    assert order(DataManager(cfg).train_loader_x) == epochs[0]


def test_set_epoch_with_a_planned_sampler(cfg):
    cfg.DATALOADER.TRAIN_X.SAMPLER = "RandomClassSampler"
    cfg.DATALOADER.TRAIN_X.N_INS = 2
    one, two = DataManager(cfg), DataManager(cfg)
    one.set_epoch(1)
    list(two.train_loader_x)
    two.set_epoch(1)
    assert order(one.train_loader_x) == order(two.train_loader_x)


def test_unlabeled_loader(cfg, files, monkeypatch):
    cfg = with_unlabeled(cfg, files, monkeypatch)
    manager = DataManager(cfg)
    assert manager.train_loader_u.batch_sampler.batch_size == 4 and len(manager.val_loader) == 1
    assert order(manager.train_loader_u) != order(manager.train_loader_x)
    cfg.DATALOADER.TRAIN_U.SAME_AS_X = False
    cfg.DATALOADER.TRAIN_U.BATCH_SIZE = 5
    assert DataManager(cfg).train_loader_u.batch_sampler.batch_size == 5


def test_workers_are_seeded_and_kept(cfg, monkeypatch):
    monkeypatch.setattr(module, "usable_workers", lambda requested: requested)
    cfg.DATALOADER.NUM_WORKERS = 2
    runs = []
    for _ in range(2):
        loader = DataManager(cfg, custom_tfm_train=RandomNoise(), custom_tfm_test=RandomNoise()).train_loader_x
        assert loader.persistent_workers and loader.num_workers == 2
        runs.append(torch.stack([torch.cat([batch["img"] for batch in loader]) for _ in range(2)]))  # [2, 8, 3]
    assert torch.equal(runs[0], runs[1])
    values = runs[0].reshape(-1, 3)
    assert all(len(values[:, i].unique()) == len(values) for i in range(3))  # no worker or epoch repeats another


def test_an_unreadable_image_in_a_worker_is_one_line(cfg, files, monkeypatch):
    monkeypatch.setattr(module, "usable_workers", lambda requested: requested)
    cfg.DATALOADER.NUM_WORKERS = 1
    with open(files[10].impath, "wb") as stream:
        stream.write(b"not an image")
    batches = iter(DataManager(cfg).test_loader)
    with pytest.raises(InputError) as caught:
        next(batches)
    batches._shutdown_workers()  # left to the garbage collector, this would take torch five seconds
    assert str(caught.value).startswith(f'Expected "{files[10].impath}" to be a readable image')
    assert "\n" not in str(caught.value) and "Traceback" in caught.value.worker_traceback


def test_number_of_workers(cfg, monkeypatch, caplog):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert [module.usable_workers(n) for n in (0, 2, 8)] == [0, 2, 2]
    with pytest.raises(InputError, match="NUM_WORKERS"):
        module.usable_workers(-1)
    cfg.DATALOADER.NUM_WORKERS = 8
    with caplog.at_level("INFO"):
        manager = DataManager(cfg)
    assert sum("NUM_WORKERS" in line for line in caplog.messages) == 1
    assert manager.train_loader_x.num_workers == 2


def test_wrong_numbers(cfg):
    cfg.DATALOADER.TRAIN_X.BATCH_SIZE = 0
    with pytest.raises(InputError, match="batch size"):
        DataManager(cfg)


def test_custom_wrapper(cfg):
    class Mine(DatasetWrapper):
        def __getitem__(self, idx):
            return {"index": idx}

    batch = next(iter(DataManager(cfg, dataset_wrapper=Mine).test_loader))
    assert list(batch) == ["index"]


# DatasetWrapper


def test_item_without_transform(cfg, files):
    entry = DatasetWrapper(cfg, files)[3]
    assert isinstance(entry["img"], Image.Image) and entry["img"].getpixel((0, 0)) == (60, 0, 0)
    assert (entry["label"], entry["domain"], entry["index"], entry["impath"]) == (1, 0, 3, files[3].impath)
    assert len(DatasetWrapper(cfg, files)) == 12


def test_several_transforms(cfg, files):
    names = {"a", "b", "c"}
    entry = DatasetWrapper(cfg, files, transform=[lambda image, n=n: n for n in sorted(names)])[0]
    assert (entry["img"], entry["img2"], entry["img3"]) == ("a", "b", "c")


def test_k_versions_in_training_only(cfg, files):
    cfg.DATALOADER.K_TRANSFORMS = 3
    assert len(DatasetWrapper(cfg, files, transform=lambda image: 1, is_train=True)[0]["img"]) == 3
    assert DatasetWrapper(cfg, files, transform=lambda image: 1)[0]["img"] == 1
    with pytest.raises(InputError, match="3 versions"):
        DatasetWrapper(cfg, files, is_train=True)


def test_img0(cfg, files):
    cfg.DATALOADER.RETURN_IMG0 = True
    image = DatasetWrapper(cfg, files, transform=lambda image: 1)[0]["img0"]
    assert image.shape == (3, 8, 8)
    torch.testing.assert_close(
        image[:, 0, 0], -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
    )
    cfg.INPUT.TRANSFORMS = ()
    assert DatasetWrapper(cfg, files, transform=lambda image: 1)[0]["img0"].abs().max() == 0


# ------------------------------------------------------------------------------------- decoded images in memory


def epochs_of_noise(cfg, files, count):
    """Images of `count` epochs under random transforms, as one run has them."""
    cfg.INPUT.TRANSFORMS = ("random_resized_crop", "colorjitter", "normalize")
    manager = DataManager(cfg)
    for epoch in range(count):
        manager.set_epoch(epoch)
        torch.manual_seed(epoch)
        yield torch.cat([batch["img"] for batch in manager.train_loader_x])


@pytest.fixture
def photos(files):
    """The images with other shapes and noise, some gray, some turned by EXIF."""
    for number, item in enumerate(files):
        rng = np.random.default_rng(number)
        image = Image.fromarray(rng.integers(256, size=(20, 10 + number, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if number % 3 == 0 else 1
        (image.convert("L") if number % 2 else image).save(item.impath, exif=exif)
    return files


@pytest.mark.parametrize("workers", [0, 2])
def test_images_in_memory_give_the_same_numbers(cfg, photos, workers):
    cfg.DATALOADER.NUM_WORKERS = workers
    plain = list(epochs_of_noise(cfg, photos, 3))
    cfg.DATALOADER.CACHE_IMAGES = 1
    kept = list(epochs_of_noise(cfg, photos, 3))
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
    assert not torch.equal(plain[0], plain[1])


def test_images_in_memory_are_decoded_once(cfg, photos):
    cfg.DATALOADER.CACHE_IMAGES = 1
    cfg.DATALOADER.TRAIN_X.BATCH_SIZE = 10
    run = epochs_of_noise(cfg, photos, 2)
    next(run)
    for item in photos:
        os.remove(item.impath)
    assert next(run).shape == (10, 3, 8, 8)


def test_what_finds_no_room_in_memory_is_decoded_again(photos):
    first, second, third = (photos[number].impath for number in (0, 2, 1))  # the second is larger than the third
    images = DecodedImages(sum(np.asarray(read_image(path)).nbytes for path in (first, third)))
    for path in (first, second, third):
        images.read(path)
        os.remove(path)
    for path in (first, third):
        images.read(path).putpixel((0, 0), (1, 2, 3))  # what a caller does to an image stays his
        assert images.read(path).getpixel((0, 0)) != (1, 2, 3)
    with pytest.raises(InputError, match="found no file"):
        images.read(second)


def test_test_images_are_not_kept_in_memory(cfg, files):
    cfg.DATALOADER.CACHE_IMAGES = 1
    loader = DataManager(cfg).test_loader
    list(loader)
    os.remove(files[10].impath)
    with pytest.raises(InputError, match="found no file"):
        list(loader)


def test_negative_memory_is_named(cfg):
    cfg.DATALOADER.CACHE_IMAGES = -1
    with pytest.raises(InputError, match="DATALOADER.CACHE_IMAGES"):
        DataManager(cfg)


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [4, 4]), (False, [4, 4, 2])])
def test_the_last_smaller_batch_is_dropped_unless_it_is_to_be_kept(cfg, drop_last, sizes):
    loader = DataManager(cfg, drop_last=drop_last).train_loader_x
    assert [len(batch["label"]) for batch in loader] == sizes and len(loader) == len(sizes)
    cfg.DATALOADER.TRAIN_X.BATCH_SIZE = 16
    assert [len(batch["label"]) for batch in DataManager(cfg, drop_last=drop_last).train_loader_x] == [10]


# ---- what code written for upstream does with loaders


class Shade:
    """A transform that says which it is."""

    def __init__(self, value):
        self.value = value

    def __call__(self, image):
        return torch.full((1, 2, 2), float(self.value))


def shades(loader):
    return {float(batch["img"].unique()) for batch in loader}


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_read_and_act_as_upstreams(cfg, files, monkeypatch, workers):
    cfg = with_unlabeled(cfg, files, monkeypatch)
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", workers, "DATALOADER.TRAIN_X.BATCH_SIZE", 4])
    manager = DataManager(cfg, custom_tfm_train=Shade(1), custom_tfm_test=Shade(2))
    train, val = manager.train_loader_x, manager.val_loader
    assert type(train.dataset) is DatasetWrapper and train.dataset.data_source is manager.dataset.train_x
    assert (train.batch_size, train.drop_last) == (4, True) and (val.drop_last, val.batch_size) == (False, 32)
    assert isinstance(train.sampler, RandomSampler) and isinstance(val.sampler, SequentialSampler)
    assert shades(train) == {1.0} and shades(val) == {2.0}
    train.dataset.transform = val.dataset.transform  # acts at once, also on processes that are running
    assert shades(train) == {2.0}
    twin = copy.deepcopy(train)
    twin.dataset.transform = Shade(3)
    assert shades(twin) == {3.0} and shades(train) == {2.0}
    again = torch.utils.data.DataLoader(
        copy.deepcopy(train.dataset), batch_size=train.batch_size, sampler=train.sampler,
        num_workers=train.num_workers, drop_last=False, pin_memory=train.pin_memory,
    )  # fmt: skip
    assert sum(len(batch["label"]) for batch in again) == len(manager.dataset.train_x) and shades(again) == {2.0}


def test_a_copy_of_a_loader_gives_the_same_batches(cfg):
    manager = DataManager(cfg)
    manager.set_epoch(3)
    twin = copy.deepcopy(manager.train_loader_x)
    assert order(twin) == order(manager.train_loader_x)


def test_reduced_decoding_changes_large_jpeg_files_alone(cfg, tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("large", (64, 48)), ("small", (20, 18))):  # at least 16 pixels are kept for 8
        noise = Image.fromarray(rng.integers(256, size=(*size[::-1], 3), dtype=np.uint8))
        noise.save(tmp_path / f"{name}.jpg", quality=95)
    items = [Datum(str(tmp_path / f"{name}.jpg"), 0, 0, "cat") for name in ("large", "small")]

    def images(decode, is_train, megabytes=0):
        cfg.INPUT.DECODE, cfg.DATALOADER.CACHE_IMAGES = decode, megabytes
        wrapper = DatasetWrapper(cfg, items, build_transform(cfg, is_train=is_train), is_train=is_train)
        return [wrapper[number]["img"] for number in range(2) for _ in range(2)]

    for is_train in (False, True):
        full, reduced = images("full", is_train), images("reduced", is_train)
        assert not torch.equal(full[0], reduced[0]) and torch.equal(full[2], reduced[2])
        assert (full[0] - reduced[0]).abs().max() < 1  # in standard deviations of the pixels
    assert all(torch.equal(a, b) for a, b in zip(reduced, images("reduced", True, 1), strict=True))


def test_what_must_be_whole_is_not_reduced(cfg):
    assert least_side(cfg, is_train=False) == 0
    cfg.INPUT.DECODE = "reduced"
    assert least_side(cfg, is_train=True) == 16
    cfg.INPUT.TRANSFORMS = ("random_crop",)
    assert least_side(cfg, is_train=True) == 0 and least_side(cfg, is_train=False) == 16
    cfg.INPUT.NO_TRANSFORM = True
    assert least_side(cfg, is_train=False) == 0
    cfg.INPUT.DECODE = "half"
    with pytest.raises(InputError, match="half"):
        least_side(cfg, is_train=True)

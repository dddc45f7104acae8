"""Images that cannot be read are skipped on demand, counted and listed."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from dassl.config import get_cfg_default
from dassl.data import DataManager
from dassl.data.bad_images import find_bad_images
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.engine import TRAINER_REGISTRY, TrainerX, build_trainer
from dassl.utils import InputError


@pytest.fixture
def files(tmp_path):
    """Twenty images of two classes, numbered; the first ten are for training, then five each for val and test."""
    for number in range(20):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    return [Datum(str(tmp_path / f"{n}.png"), n % 2, classname=["cat", "dog"][n % 2]) for n in range(20)]


@pytest.fixture
def cfg(files, tmp_path, monkeypatch):
    class Numbered(DatasetBase):
        def __init__(self, cfg):
            super().__init__(train_x=files[:10], val=files[10:15], test=files[15:])

    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "Numbered", Numbered)
    cfg = get_cfg_default()
    cfg.merge_from_list(["DATASET.NAME", "Numbered", "SEED", 0, "INPUT.SIZE", (8, 8), "DATALOADER.NUM_WORKERS", 0])
    cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / "run"), "USE_CUDA", False, "DATALOADER.SKIP_BAD_IMAGES", True])
    return cfg


def spoil(files, *numbers):
    for number in numbers:
        with open(files[number].impath, "wb") as file:
            file.write(b"no image")


def test_find(files):
    spoil(files, 3, 7)
    open(files[5].impath, "w").close()
    bad = find_bad_images([item.impath for item in files] * 2)
    assert list(bad) == [files[number].impath for number in (3, 5, 7)]
    assert "an empty file" in bad[files[5].impath]


def test_lists_go_on_without_them(cfg, files, caplog):
    spoil(files, 3, 12, 19)
    manager = DataManager(cfg)
    dataset = manager.dataset
    assert dataset.train_x == [*files[:3], *files[4:10]]
    assert dataset.val == [*files[10:12], *files[13:15]] and dataset.test == files[15:19]
    assert list(manager.bad_images) == [files[number].impath for number in (3, 12, 19)]
    assert "Skipped 3 images" in caplog.text and files[12].impath in caplog.text
    assert sum(len(batch["label"]) for batch in manager.test_loader) == 4


def test_whole_images_all_stay(cfg, files):
    manager = DataManager(cfg)
    assert manager.bad_images == {} and len(manager.dataset.train_x) == 10


def test_not_asked_for(cfg, files):
    spoil(files, 3)
    cfg.DATALOADER.SKIP_BAD_IMAGES = False
    assert DataManager(cfg).bad_images == {}


def test_a_class_may_not_be_left_bare(cfg, files):
    spoil(files, *range(0, 10, 2))
    with pytest.raises(InputError, match="Numbered.*cat would have none"):
        DataManager(cfg)


def test_nothing_left_to_test_on(cfg, files):
    spoil(files, *range(15, 20))
    with pytest.raises(InputError, match="test images that can be read"):
        DataManager(cfg)


class Mean(TrainerX):
    def build_model(self):
        pass

    def model_inference(self, input):
        return input.mean(dim=(2, 3))[:, :2]


def test_they_are_listed_in_the_run_folder(cfg, files, tmp_path, monkeypatch):
    spoil(files, 3, 19)
    monkeypatch.setitem(TRAINER_REGISTRY._obj_map, "Mean", Mean)
    cfg.TRAINER.NAME = "Mean"
    build_trainer(cfg).test()
    lines = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [files[3].impath, files[19].impath]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["bad_images"] == 2 and metrics["test"]["n"] == 4

"""A reader as people write them for CoOp, on our toolbox and our classes, unchanged."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from PIL import Image

from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.utils import mkdir_if_missing, set_random_seed
from datasets import extend_cfg
from datasets.dtd import DescribableTextures
from datasets.imagenet import ImageNet
from datasets.oxford_pets import OxfordPets
from datasets.splits import read_split

NAMES = {"a": "Alpha", "b": "Beta"}


class Mine(DatasetBase):
    """What the recipe asks for: a split file, pickled few-shot picks, base and new classes."""

    dataset_dir = "mine"

    def __init__(self, cfg):
        root = os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT))
        self.dataset_dir = os.path.join(root, self.dataset_dir)
        self.image_dir = os.path.join(self.dataset_dir, "images")
        self.split_path = os.path.join(self.dataset_dir, "split.json")
        self.split_fewshot_dir = os.path.join(self.dataset_dir, "split_fewshot")
        mkdir_if_missing(self.split_fewshot_dir)
        if os.path.exists(self.split_path):
            train, val, test = OxfordPets.read_split(self.split_path, self.image_dir)
        else:
            train, val, test = DescribableTextures.read_and_split_data(self.image_dir, ignored=["c"], new_cnames=NAMES)
            OxfordPets.save_split(train, val, test, self.split_path, self.image_dir)
        shots = cfg.DATASET.NUM_SHOTS
        picks = os.path.join(self.split_fewshot_dir, f"shot_{shots}-seed_{cfg.SEED}.pkl")
        if os.path.exists(picks):
            with open(picks, "rb") as file:
                data = pickle.load(file)
            train, val = data["train"], data["val"]
        else:
            train = self.generate_fewshot_dataset(train, num_shots=shots)
            val = self.generate_fewshot_dataset(val, num_shots=min(shots, 4))
            with open(picks, "wb") as file:
                pickle.dump({"train": train, "val": val}, file, protocol=pickle.HIGHEST_PROTOCOL)
        subsample = cfg.DATASET.SUBSAMPLE_CLASSES
        train, val, test = OxfordPets.subsample_classes(train, val, test, subsample=subsample)
        super().__init__(train_x=train, val=val, test=test)


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "Mine", Mine)
    for key in ("a", "b", "c", "d"):
        (tmp_path / "mine" / "images" / key).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (4, 4)).save(tmp_path / "mine" / "images" / key / f"{number}.png")
    cfg = get_cfg_default()
    extend_cfg(cfg)
    cfg.merge_from_list(["DATASET.ROOT", str(tmp_path), "DATASET.NUM_SHOTS", 2, "SEED", 1])
    return cfg


def test_a_reader_written_for_coop_runs_as_it_is(cfg, tmp_path):
    set_random_seed(1)
    first = Mine(cfg)
    assert first.classnames == ["Alpha", "Beta", "d"]
    assert [len(items) for items in (first.train_x, first.val, first.test)] == [6, 6, 9]
    content = json.loads((tmp_path / "mine" / "split.json").read_text())
    assert [len(content[part]) for part in ("train", "val", "test")] == [15, 6, 9]
    assert not any(os.path.isabs(item[0]) for part in content.values() for item in part)
    again = Mine(cfg)  # from the split file and the pickle
    assert [item.impath for item in again.train_x] == [item.impath for item in first.train_x]
    cfg.DATASET.SUBSAMPLE_CLASSES = "new"
    new = Mine(cfg)
    assert new.classnames == ["d"] and {item.label for item in new.test} == {0}


def test_the_tools_are_those_of_our_own_readers(tmp_path):
    images = [Datum(str(tmp_path / f"{k}_{n}.png"), k, classname=f"c{k}") for k in range(2) for n in range(10)]
    train, val = OxfordPets.split_trainval(images)
    assert (len(train), len(val)) == (16, 4) and {item.label for item in val} == {0, 1}
    OxfordPets.save_split(train[1:], val, train[:1], tmp_path / "s.json", tmp_path)
    assert OxfordPets.read_split(tmp_path / "s.json", tmp_path) == read_split(tmp_path / "s.json", tmp_path)
    (tmp_path / "classnames.txt").write_text("n02 tench\nn01 German Shepherd Dog\n")
    assert ImageNet.read_classnames(tmp_path / "classnames.txt") == {"n01": "German Shepherd Dog", "n02": "tench"}


@pytest.mark.parametrize(("p_trn", "p_val", "sizes"), [(0.5, 0.2, (5, 2, 3)), (0.6, 0.3, (6, 3, 1))])
def test_shares(tmp_path, p_trn, p_val, sizes):
    (tmp_path / "a").mkdir()
    for number in range(10):
        Path(tmp_path / "a" / f"{number}.jpg").touch()
    split = DescribableTextures.read_and_split_data(str(tmp_path), p_trn, p_val)
    assert tuple(map(len, split)) == sizes

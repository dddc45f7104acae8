"""The fifteen readers on miniature trees, with and without a split file: labels, names, counts, order, oddities."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dataset_trees import (
    CARS,
    CLASSNAMES,
    FLOWER_LABELS,
    OTHERS,
    TREES,
    VARIANTS,
    WNIDS,
    make_tree,
    write_folder,
    write_image,
)

from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY, base_dataset
from dassl.utils import InputError
from datasets import extend_cfg
from datasets.picks import COOP_DATUM
from datasets.split_dataset import SplitDataset
from datasets.splits import relative_items
from datasets.stanford_cars import year_first
from datasets.sun397 import scene_name
from datasets.ucf101 import action_name

SHIFTED = ("ImageNetV2", "ImageNetSketch", "ImageNetA", "ImageNetR")
BENCHMARKS = tuple(name for name in TREES if name not in OTHERS)
WITH_SPLIT_FILE = tuple(
    name
    for name in BENCHMARKS
    if issubclass(DATASET_REGISTRY.get(name), SplitDataset) and DATASET_REGISTRY.get(name).split_name
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLR_CLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def build(tmp_path):
    """Build a reader by name on its tree, which is made on first use."""

    def build(name: str, *pairs: Any):
        root = tmp_path / "data"
        if not root.exists():
            root.mkdir()
            make_tree(name, root)
        cfg = get_cfg_default()
        extend_cfg(cfg)
        cfg.merge_from_list(["DATASET.ROOT", str(root), "SEED", 1, *pairs])
        return DATASET_REGISTRY.get(name)(cfg)

    return build


def sizes(dataset) -> tuple[int, int, int]:
    return len(dataset.train_x), len(dataset.val or ()), len(dataset.test)


def paths(data, dataset) -> list[str]:
    return [item[0] for item in relative_items(data, dataset.image_dir)]


def by_label(data) -> dict[int, int]:
    return dict(Counter(item.label for item in data))


# What each tree holds: class names by label, and the sizes of train, val, test.
EXPECTED = {
    "ImageNet": (["tench", "German Shepherd Dog", "missile", "missile"], (48, 0, 12)),
    # Capitals first by folder name (Faces, Motorbikes, accordion, water_lilly); 10, 5, 13, 30 images.
    "Caltech101": (["face", "motorbike", "accordion", "water_lilly"], (5 + 2 + 6 + 15, 2 + 1 + 3 + 6, 3 + 2 + 4 + 9)),
    "OxfordPets": (["abyssinian", "egyptian_mau", "english_cocker_spaniel"], (30, 6, 12)),
    "StanfordCars": (
        ["2000 AM General Hummer SUV", "2012 Ram C/V Cargo Van Minivan", "2012 Audi TTS Coupe"],
        (18, 6, 6),
    ),
    # 5, 13 and 10 images of labels 2, 0 and 1.
    "OxfordFlowers": (
        ["pink primrose", "bird of paradise", "hard-leaved pocket orchid"],
        (2 + 6 + 5, 1 + 3 + 2, 2 + 4 + 3),
    ),
    "Food101": (["apple_pie", "pad_thai", "waffles"], (15, 6, 9)),
    "FGVCAircraft": (["707-320", "F-16A/B", "Falcon 900"], (18, 9, 9)),
    "SUN397": (["abbey", "outdoor apartment_building", "zen_garden"], (24, 6, 15)),
    "DescribableTextures": (["banded", "polka-dotted", "woven"], (15, 6, 9)),
    "EuroSAT": (["Annual Crop Land", "Highway or Road", "River", "Sea or Lake"], (20, 8, 12)),
    "UCF101": (["Apply_Eye_Makeup", "Hammering", "Hammer_Throw", "Yo_Yo"], (32, 8, 12)),
    "ImageNetV2": (["tench", "German Shepherd Dog", "missile", "missile"], (12, 0, 12)),
    "ImageNetSketch": (["tench", "German Shepherd Dog", "missile", "missile"], (12, 0, 12)),
    "ImageNetA": (["German Shepherd Dog", "missile"], (6, 0, 6)),
    "ImageNetR": (["tench", "missile"], (6, 0, 6)),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_names_labels_and_counts_without_a_split_file(name, build):
    dataset = build(name)
    classnames, counts = EXPECTED[name]
    assert dataset.classnames == classnames
    assert sizes(dataset) == counts
    assert {item.label for item in dataset.test} == set(range(len(classnames)))


@pytest.mark.parametrize("name", WITH_SPLIT_FILE)
def test_made_split_is_saved_under_coops_name_and_read_back(name, build, tmp_path):
    first = build(name)
    file = Path(first.dataset_dir) / first.split_name
    assert file.name == f"split_zhou_{name}.json"
    content = json.loads(file.read_text())
    assert list(content) == ["train", "val", "test"]
    assert content["test"] == relative_items(first.test, first.image_dir)
    second = build(name)
    assert first.split_digest == second.split_digest
    assert (first.train_x, first.val, first.test) == (second.train_x, second.val, second.test)
    # Elsewhere and from scratch: the same split.
    shutil.rmtree(tmp_path / "data")
    third = build(name)
    assert third.split_digest == first.split_digest


@pytest.mark.parametrize("name", WITH_SPLIT_FILE)
def test_with_a_split_file_nothing_else_is_read(name, build):
    first = build(name)
    folder = Path(first.dataset_dir)
    file = folder / first.split_name
    content = json.loads(file.read_text())
    for part in content.values():  # other names, another order of labels
        for item in part:
            item[1], item[2] = first.num_classes - 1 - item[1], f"renamed {item[2]}"
    content["train"].reverse()
    file.write_text(json.dumps(content))
    images = [folder / source for source in first.sources if (folder / source).is_dir()]
    for source in first.sources:
        if folder / source not in images:
            (folder / source).write_text("not read")
    second = build(name)
    assert second.classnames == [f"renamed {name}" for name in reversed(first.classnames)]
    assert paths(second.train_x, second) == paths(first.train_x, first)[::-1]


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in SHIFTED])
def test_few_shots_halves_and_the_global_generator(name, build):
    state = random.getstate()
    both = build(name, "DATASET.NUM_SHOTS", 2)
    assert random.getstate() == state
    assert set(by_label(both.train_x).values()) == {2}
    assert set(by_label(both.val).values()) <= {1, 2}
    assert not {i.impath for i in both.train_x} & {i.impath for i in both.val}
    base, new = (build(name, "DATASET.NUM_SHOTS", 2, "DATASET.SUBSAMPLE_CLASSES", half) for half in ("base", "new"))
    assert base.num_classes == -(-both.num_classes // 2)
    assert base.classnames + new.classnames == both.classnames
    assert sorted(paths(base.train_x, base) + paths(new.train_x, new)) == sorted(paths(both.train_x, both))
    assert len(base.test) + len(new.test) == len(both.test)
    other = build(name, "DATASET.NUM_SHOTS", 2, "SEED", 2)
    assert paths(other.train_x, other) != paths(both.train_x, both)
    record = json.loads((Path(both.dataset_dir) / "split_fewshot" / "shot_2-seed_1.json").read_text())
    assert record["dataset"] == name and record["train"] == relative_items(both.train_x, both.image_dir)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_listing_order_of_the_file_system_does_not_matter(name, build, tmp_path, monkeypatch):
    first = build(name)
    for made in (tmp_path / "data").glob("*/split_*.json"):
        made.unlink()
    scandir = os.scandir

    class Backwards:
        def __init__(self, folder):
            with scandir(folder) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    second = build(name)
    assert (first.train_x, first.val, first.test) == (second.train_x, second.val, second.test)


# ------------------------------------------------------------------------------------------ one by one


def test_caltech_leaves_out_folders_and_hidden_entries(build):
    dataset = build("Caltech101")
    everything = "".join(item.impath for part in (dataset.train_x, dataset.val, dataset.test) for item in part)
    for word in ("BACKGROUND", "Faces_easy", "hidden", ".git", "README", "tmp\n"):
        assert word not in everything
    # Halves round to even: 5 -> 2 / 1 / 2 and 13 -> 6 / 3 / 4.
    assert [by_label(part)[1] for part in (dataset.train_x, dataset.val, dataset.test)] == [2, 1, 2]
    assert [by_label(part)[2] for part in (dataset.train_x, dataset.val, dataset.test)] == [6, 3, 4]


def test_flowers_come_in_the_order_of_first_appearance(build):
    dataset = build("OxfordFlowers")
    assert list(by_label(dataset.train_x)) == [2, 0, 1]
    for item in (*dataset.train_x, *dataset.val, *dataset.test):
        number = int(Path(item.impath).stem.removeprefix("image_"))
        assert item.label == FLOWER_LABELS[number - 1] - 1


def test_pets_read_the_official_lists(build):
    dataset = build("OxfordPets")
    assert list(by_label(dataset.train_x)) == [1, 0, 2]
    assert paths(dataset.test, dataset)[0] == "Egyptian_Mau_13.jpg"
    assert by_label(dataset.val) == {1: 2, 0: 2, 2: 2}  # round(2.4)


def test_cars_keep_folders_in_their_paths_and_move_the_year(build):
    dataset = build("StanfordCars")
    assert {path.split("/")[0] for path in paths(dataset.train_x, dataset)} == {"cars_train"}
    assert paths(dataset.test, dataset) == [f"cars_test/{number:05d}.jpg" for number in range(1, 7)]
    assert list(by_label(dataset.train_x)) == [0, 1, 2] and [item.label for item in dataset.test[:3]] == [0, 1, 2]
    assert [year_first(name) for name in CARS] == dataset.classnames


def test_sun_names_turn_round_and_labels_follow_the_list(build):
    dataset = build("SUN397")
    assert paths(dataset.test, dataset)[0] == "z/zen_garden/sun_0010.jpg"
    assert dataset.test[0].label == 2
    assert scene_name("a/apartment_building/outdoor") == "outdoor apartment_building"


def test_ucf_frames_and_numbers(build):
    dataset = build("UCF101")
    assert paths(dataset.test, dataset)[0] == "Apply_Eye_Makeup/v_ApplyEyeMakeup_g10_c01.jpg"
    assert [action_name(name) for name in ("YoYo", "JumpRope", "TaiChi")] == ["Yo_Yo", "Jump_Rope", "Tai_Chi"]


def test_aircraft_use_the_official_lists_in_their_order(build):
    dataset = build("FGVCAircraft")
    assert [item.classname for item in dataset.val[:3]] == [VARIANTS[2], VARIANTS[0], VARIANTS[1]]
    assert paths(dataset.val, dataset)[:3] == ["0000006.jpg", "0000007.jpg", "0000008.jpg"]
    assert not list(Path(dataset.dataset_dir).glob("*.json"))


# ------------------------------------------------------------------------------------------ ImageNet


def test_imagenet_validates_on_training_images_that_were_not_picked(build):
    for shots, expected in ((1, 1), (4, 4), (9, 3)):  # 12 training images a class: 3 are left of 9
        dataset = build("ImageNet", "DATASET.NUM_SHOTS", shots)
        train, val = set(paths(dataset.train_x, dataset)), set(paths(dataset.val, dataset))
        assert all(path.startswith("train/") for path in train | val)
        assert not train & val
        assert by_label(dataset.val) == dict.fromkeys(range(4), expected)
        again = build("ImageNet", "DATASET.NUM_SHOTS", shots)  # from the saved picks
        assert (again.train_x, again.val) == (dataset.train_x, dataset.val)
    # The training picks are those that CoOp draws from the same list.
    folder = [f"train/{wnid}/{wnid}_{n}.JPEG" for wnid in WNIDS for n in sorted(range(1, 13), key=str)]
    random.seed(1)
    naive = [path for start in range(0, 48, 12) for path in random.sample(folder[start : start + 12], 9)]
    assert paths(dataset.train_x, dataset) == naive


def test_imagenet_without_shots_has_no_validation_set(build):
    assert build("ImageNet").val is None


def test_all_images_picked_leaves_none_to_validate_on(build):
    assert build("ImageNet", "DATASET.NUM_SHOTS", 12).val is None


def test_imagenet_with_coops_validation_selects_nothing(build):
    own = build("ImageNet", "DATASET.NUM_SHOTS", 2)
    coop = build("ImageNet", "DATASET.NUM_SHOTS", 2, "DATASET.VAL", "coop")
    assert coop.val == coop.test and coop.train_x == own.train_x
    base = build("ImageNet", "DATASET.NUM_SHOTS", 2, "DATASET.VAL", "coop", "DATASET.SUBSAMPLE_CLASSES", "base")
    assert base.val == base.test and base.num_classes == 2
    with pytest.raises(InputError, match="best_val"):
        build("ImageNet", "DATASET.VAL", "coop", "TEST.FINAL_MODEL", "best_val")
    for name in ("ImageNet", "EuroSAT"):
        with pytest.raises(InputError, match="own or coop but got 'test'"):
            if name != "ImageNet":
                make_tree(name, Path(own.dataset_dir).parent)
            build(name, "DATASET.VAL", "test")


def test_coops_imagenet_pickle_has_no_validation_images(build, monkeypatch, caplog):
    fresh = build("ImageNet", "DATASET.NUM_SHOTS", 2)
    folder = Path(fresh.dataset_dir) / "split_fewshot"
    (folder / "shot_2-seed_1.json").unlink()
    other = build("ImageNet", "DATASET.NUM_SHOTS", 2, "SEED", 7)

    def old(items) -> list[Any]:
        datum = type("Datum", (), {"__module__": COOP_DATUM[0]})
        monkeypatch.setattr(base_dataset, "Datum", datum)
        made = []
        for item in items:
            made.append(datum())
            path = item.impath.replace(fresh.dataset_dir, "/elsewhere/imagenet")
            vars(made[-1]).update(_impath=path, _label=item.label, _domain=0, _classname=item.classname)
        return made

    (folder / "shot_2-seed_1.pkl").write_bytes(pickle.dumps({"train": old(other.train_x)}))
    monkeypatch.undo()
    caplog.set_level(logging.INFO)
    continued = build("ImageNet", "DATASET.NUM_SHOTS", 2)
    assert "shot_2-seed_1.pkl" in caplog.text
    assert paths(continued.train_x, continued) == paths(other.train_x, other)
    assert by_label(continued.val) == dict.fromkeys(range(4), 2)
    assert not {i.impath for i in continued.train_x} & {i.impath for i in continued.val}


def test_missile_and_missile_stay_apart(build):
    dataset = build("ImageNet", "DATASET.NUM_SHOTS", 2)
    assert dataset.lab2cname[2] == dataset.lab2cname[3] == "missile"
    assert {item.impath.split("/")[-2] for item in dataset.test if item.label == 3} == {WNIDS[3]}
    new = build("ImageNet", "DATASET.NUM_SHOTS", 2, "DATASET.SUBSAMPLE_CLASSES", "new")
    assert new.classnames == ["missile", "missile"] and by_label(new.test) == {0: 3, 1: 3}


def test_part_of_imagenet_is_read_with_a_warning(build, caplog):
    folder = Path(build("ImageNet").image_dir)
    for part in ("train", "val"):
        shutil.rmtree(folder / part / WNIDS[1])
    dataset = build("ImageNet")
    assert "3 of the 4 classes" in caplog.text
    assert dataset.classnames == ["tench", "missile", "missile"]


@pytest.mark.parametrize(
    ("name", "indices"),
    [("ImageNetV2", [0, 1, 2, 3]), ("ImageNetSketch", [0, 1, 2, 3]), ("ImageNetA", [1, 3]), ("ImageNetR", [0, 2])],
)
def test_shifted_sets_say_which_of_imagenets_classes_they_have(name, indices, build, caplog):
    dataset = build(name, "DATASET.NUM_SHOTS", 16, "DATASET.SUBSAMPLE_CLASSES", "base")
    assert dataset.class_indices == indices
    assert dataset.classnames == [CLASSNAMES[WNIDS[index]] for index in indices]
    assert dataset.test_only and dataset.val is None and dataset.train_x == dataset.test
    assert "SUBSAMPLE_CLASSES has no effect" in caplog.text
    assert len(dataset.split_digest) == 64
    for item in dataset.test:
        folder = item.impath.split("/")[-2]
        assert folder in (WNIDS[indices[item.label]], str(item.label))


def test_v2_folders_are_numbers_not_words(tmp_path, build, monkeypatch):
    root = tmp_path / "data"
    (root / "imagenetv2").mkdir(parents=True)
    lines = [f"n{label:08d} class {label}" for label in range(12)]
    (root / "imagenetv2" / "classnames.txt").write_text("\n".join(lines))
    for label in range(12):
        write_image(root / "imagenetv2" / "imagenetv2-matched-frequency-format-val" / str(label) / "a.jpeg")
    dataset = build("ImageNetV2")
    assert [item.classname for item in dataset.test] == [f"class {label}" for label in range(12)]
    assert dataset.class_indices == list(range(12))


def test_shifted_sets_fall_back_on_imagenets_class_names(build, tmp_path):
    first = build("ImageNetA")
    (tmp_path / "data" / "imagenet").mkdir()
    shutil.move(Path(first.dataset_dir) / "classnames.txt", tmp_path / "data" / "imagenet" / "classnames.txt")
    assert build("ImageNetA").classnames == first.classnames


def test_files_are_checked_by_one_listing_per_folder(build, monkeypatch):
    dataset = build("EuroSAT")
    write_folder(Path(dataset.image_dir) / "River", 3, "more_{}.jpg")
    listed: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(str(folder)) or scandir(folder))
    monkeypatch.setattr(os, "stat", lambda *a, real=os.stat, **k: listed.append("stat") or real(*a, **k))
    assert sizes(build("EuroSAT")) == sizes(dataset)  # images that the split does not list do not count
    assert sum(folder.startswith(dataset.image_dir) for folder in listed) == dataset.num_classes
    assert listed.count("stat") < 20

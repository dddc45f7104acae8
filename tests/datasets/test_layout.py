"""Folders that are parts of a split, folders that are classes, and what systems leave beside both."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image

from dassl.config import get_cfg_default
from dassl.utils import InputError
from datasets import extend_cfg, files, name_dataset
from datasets.files import list_images_below
from datasets.image_folder import ImageFolder
from datasets.layout import part_of, scan_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DLR_CLIP_CACHE", str(tmp_path / "cache"))


def fill(root: Path, *folders: str, count: int = 4) -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (4, 4)).save(root / folder / f"{number}.png")
    return root


def understood(root: Path) -> dict[str, set[str]]:
    """Part -> classes."""
    found: dict[str, set[str]] = {}
    for photo in scan_folder(root):
        found.setdefault(photo.part, set()).add(photo.key)
    return found


def build(root: Path, *pairs: object) -> ImageFolder:
    cfg = get_cfg_default()
    extend_cfg(cfg)
    cfg.merge_from_list(["DATASET.ROOT", str(root), "SEED", 1, *pairs])
    return ImageFolder(cfg)


@pytest.mark.parametrize(
    "names",
    [
        {"Training": "train", "Testing": "test"},
        {"TRAIN": "train", "TEST": "test"},
        {"Train": "train", "Val": "val", "Test": "test"},
        {"training_set": "train", "test_set": "test"},
        {"trainset": "train", "testset": "test"},
        {"train images": "train", "validation-images": "val"},
        {"flowers_train": "train", "flowers_valid": "val", "flowers_test": "test"},
        {"seg_train/seg_train": "train", "seg_test/seg_test": "test"},
        {"train/Train": "train", "test/Test": "test"},
        {"train": "train"},
    ],
    ids=lambda names: " ".join(names),
)
def test_folders_are_parts_by_case_and_synonym(tmp_path, names):
    fill(tmp_path, *(f"{name}/{key}" for name in names for key in ("cat", "dog")))
    assert understood(tmp_path) == {part: {"cat", "dog"} for part in names.values()}
    assert build(tmp_path).classnames == ["cat", "dog"]


@pytest.mark.parametrize("name", ["trainer", "contest", "value", "latest", "train station", "test tube", "Trains"])
def test_names_that_only_look_like_parts(name):
    assert part_of(name) == ""


def test_a_class_may_be_called_like_a_part(tmp_path):
    assert understood(fill(tmp_path, "train", "plane", "car")) == {"": {"train", "plane", "car"}}


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (("val/cat", "val/dog", "test/cat", "test/dog"), "a folder train beside the others.*test \\(test\\), val"),
        (("Training", "Testing"), "like the parts of a split.*one folder of images per class"),
        (("train/cat", "train/dog", "training/cat"), "one folder for train.*train and training"),
        (("train/2019", "train/2020", "plane", "car"), "either one folder per class or the parts.*car, plane"),
        (("photos/cat", "photos/dog"), "the one folder photos.*give --root .*photos"),
        (("train/cat", "train/dog", "test/cat", "test/dgo"), 'test.*to be those of train.*"dgo"'),
    ],
)
def test_what_cannot_be_told_apart_is_refused(tmp_path, folders, words):
    fill(tmp_path, *folders)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words):
        build(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_stray_images_are_left_out_with_a_word(tmp_path, caplog):
    fill(tmp_path, "train/cat", "train/dog", "test/cat", "test/dog")
    Image.new("RGB", (4, 4)).save(tmp_path / "cover.jpg")
    Image.new("RGB", (4, 4)).save(tmp_path / "train" / "sheet.jpg")
    assert understood(tmp_path) == {"train": {"cat", "dog"}, "test": {"cat", "dog"}}
    assert "cover.jpg" in caplog.text and "sheet.jpg" in caplog.text


def test_test_images_without_classes_are_left_out_with_a_word(tmp_path, caplog):
    fill(tmp_path, "train/cat", "train/dog", "test")
    assert understood(tmp_path) == {"train": {"cat", "dog"}}
    assert "4 images lie in no class folder" in caplog.text


def test_what_was_understood_is_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fill(tmp_path / "own", "train/cat", "train/dog", "test/cat", "test/dog")
    fill(tmp_path / "own", "train/cat", count=7)
    build(tmp_path / "own")
    told = next(message for message in caplog.messages if message.startswith("Images in"))
    assert "2 classes, 19 images (val drawn once, the rest as given)" in told
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines()[2:]}
    assert rows == {"cat": ["train", "6", "val", "1", "test", "4"], "dog": ["train", "3", "val", "1", "test", "4"]}
    caplog.clear()
    build(fill(tmp_path / "drawn", "cat", "dog", count=10))
    assert "2 classes, 20 images (split drawn once)" in caplog.text


JUNK = ("@eaDir", "@EADIR", ".AppleDouble", ".thumbnails", "$RECYCLE.BIN", "__MACOSX", "lost+found", "#recycle")


@pytest.mark.parametrize("junk", JUNK)
def test_what_systems_leave_is_neither_class_nor_image(tmp_path, junk):
    fill(tmp_path, "cat", "dog", junk, f"cat/{junk}", f"dog/{junk}/0.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "._0.png", "png")
    assert understood(tmp_path) == {"": {"cat", "dog"}}
    assert [photo.path for photo in scan_folder(tmp_path)] == [f"{k}/{n}.png" for k in ("cat", "dog") for n in range(4)]
    assert list_images_below(tmp_path) == [photo.path for photo in scan_folder(tmp_path)]
    fill(tmp_path / "parts", "train/cat", "train/dog", f"train/{junk}", junk)
    assert understood(tmp_path / "parts") == {"train": {"cat", "dog"}}


def test_a_link_to_no_image_is_an_image_that_is_missing(tmp_path):
    fill(tmp_path, "cat", "dog", count=6)
    (tmp_path / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(InputError, match=r"images .* to exist but 1 of 13 do not: .*cat/gone\.jpg"):
        build(tmp_path)
    assert not (tmp_path / "split.json").exists()
    dataset = build(tmp_path, "DATALOADER.SKIP_BAD_IMAGES", True)  # then it is skipped with those that cannot be read
    assert sum(len(items or []) for items in (dataset.train_x, dataset.val, dataset.test)) == 13


def test_other_images_under_the_same_names_have_another_digest(tmp_path):
    for root, side in (("a", 4), ("b", 4), ("c", 40)):
        for key in ("cat", "dog"):
            (tmp_path / root / key).mkdir(parents=True)
            for number in range(6):
                Image.new("RGB", (side, side)).save(tmp_path / root / key / f"{number}.bmp")
    a, b, c = (build(tmp_path / root) for root in "abc")
    assert a.split_digest == b.split_digest == c.split_digest
    assert a.data_digest == b.data_digest != c.data_digest  # a copy of the folder is the same data


def test_which_dataset_is_meant_without_a_name(tmp_path):
    assert name_dataset("") == "Digits"
    assert name_dataset(str(fill(tmp_path / "own", "cat", "dog"))) == "ImageFolder"
    assert name_dataset(str(fill(tmp_path / "parts", "train/cat", "train/dog"))) == "ImageFolder"
    (tmp_path / "list.csv").write_text("path,label\n")
    assert name_dataset(str(tmp_path / "list.csv")) == "ImageFolder"
    fill(tmp_path / "data", "eurosat/2750/River", "oxford_pets/images")
    for root, words in (
        (tmp_path / "data", "eurosat \\(EuroSAT\\), oxford_pets \\(OxfordPets\\)"),
        (tmp_path / "no", "is not there"),
        (tmp_path / "own" / "cat", "no folder of your own images either"),
    ):
        with pytest.raises(InputError, match=f"--dataset-config-file.*{words}"):
            name_dataset(str(root))


def test_one_image_is_enough_to_take_a_folder_for_ones_own(tmp_path, monkeypatch):
    """The dataset reads the whole tree afterwards; whether there are images is seen at the first one."""
    root = fill(tmp_path / "own", "Training/cat", "Training/dog", "Testing/cat", "Testing/dog")
    listed, listing = [], files.list_images
    monkeypatch.setattr(files, "list_images", lambda folder: listed.append(str(folder)) or listing(folder))
    assert name_dataset(str(root)) == "ImageFolder"
    assert listed == [str(root / "Testing"), str(root / "Testing" / "cat")]

"""Your own images: the layouts, class names, the split and its reuse, and what can be wrong with them."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from dassl.config import get_cfg_default
from dassl.utils import InputError
from datasets import extend_cfg
from datasets.image_folder import ImageFolder, class_names, read_csv


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DLR_CLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "my photos"


def fill(root: Path, **counts: int) -> Path:
    """`root/<folder>/<number>.png`; in folder names "__" stands for "/"."""
    for folder, count in counts.items():
        place = root / folder.replace("__", "/")
        place.mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4)).save(place / f"{number:02d}.png")
    return root


def build(root: Path, shots: int = -1, seed: int = 1, classes: str = "all") -> ImageFolder:
    cfg = get_cfg_default()
    extend_cfg(cfg)
    cfg.merge_from_list(
        ["DATASET.ROOT", str(root), "DATASET.NUM_SHOTS", shots, "SEED", seed, "DATASET.SUBSAMPLE_CLASSES", classes]
    )
    return ImageFolder(cfg)


def paths(dataset: ImageFolder, part: str) -> list[str]:
    return [os.path.relpath(item.impath, dataset.image_dir) for item in getattr(dataset, part) or []]


def sizes(dataset: ImageFolder) -> tuple[int, int, int]:
    train, val, test = (len(getattr(dataset, part) or []) for part in ("train_x", "val", "test"))
    return train, val, test


# -------------------------------------------------------------------------------------------------------- folders


def test_twenty_photos_a_class_and_sixteen_shots(root, caplog):
    dataset = build(fill(root, dog=20, cat=20, Ape=20), shots=16)
    assert dataset.classnames == ["Ape", "cat", "dog"]  # code points: upper case first
    assert sizes(dataset) == (30, 12, 18)
    assert Counter(item.label for item in dataset.train_x) == {0: 10, 1: 10, 2: 10}
    assert "no class has more than 10 training images: all are used" in caplog.text
    assert not set(paths(dataset, "train_x")) & set(paths(dataset, "test"))


def test_what_few_shots_leave_unused_is_said(root, caplog):
    caplog.set_level("INFO")
    fill(root, dog=20, cat=20, Ape=6)  # half of each class is for training
    said = "Using {} of 23 training images, at most {} per class (DATASET.NUM_SHOTS; -1 takes all)"
    for shots, used in ((4, 11), (1, 3), (4, 11)):  # the last picks come out of their file
        caplog.clear()
        build(root, shots=shots)
        assert said.format(used, shots) in caplog.messages
    caplog.clear()
    build(root)
    assert "Using" not in caplog.text


def test_a_split_is_made_once_and_reused(root, caplog):
    first = build(fill(root, cat=10, dog=12))
    content = json.loads((root / "split.json").read_text())
    assert [len(content[part]) for part in ("train", "val", "test")] == [11, 4, 7]
    assert content["train"][0][1:] == [0, "cat"] and content["train"][0][0].startswith("cat/")
    shutil.copy(root / "cat" / "00.png", root / "cat" / "new.png")
    again = build(root)
    assert again.split_digest == first.split_digest and paths(again, "test") == paths(first, "test")
    assert "1 images" in caplog.text and "cat/new.png" in caplog.text and "Delete it" in caplog.text
    (root / "split.json").unlink()
    assert sum(sizes(build(root))) == 23


def test_the_split_is_the_same_on_every_machine(root, tmp_path):
    fill(root, cat=9, dog=9)
    copy = tmp_path / "elsewhere"
    for path in sorted(root.glob("*/*"), reverse=True):  # made in another order
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy / path.parent.name / path.name)
    assert paths(build(root), "train_x") == paths(build(copy), "train_x")


def test_few_shot_picks_follow_the_seed_and_are_kept(root):
    fill(root, cat=30, dog=30)
    one, two = build(root, shots=4, seed=1), build(root, shots=4, seed=2)
    assert sizes(one)[:2] == (8, 8) and paths(one, "train_x") != paths(two, "train_x")
    assert paths(build(root, shots=4, seed=1), "train_x") == paths(one, "train_x")
    assert (root / "split_fewshot" / "shot_4-seed_1.json").is_file()
    assert build(root, classes="new").classnames == ["dog"]


def test_what_is_no_class_and_no_image_is_left_out(root, caplog):
    fill(root, cat=5, dog=4, dog__puppies=3)
    (root / "__MACOSX").mkdir()
    (root / ".hidden").mkdir()
    (root / "notes.txt").write_text("mine")
    (root / "cat" / "IMG_1.HEIC").touch()
    (root / "cat" / ".DS_Store").touch()
    dataset = build(root)
    assert dataset.classnames == ["cat", "dog"] and sum(sizes(dataset)) == 12
    assert any("puppies/" in path for part in ("train_x", "val", "test") for path in paths(dataset, part))
    assert "are no images of a known kind: .heic (1)" in caplog.text


def test_folders_may_be_links(root, tmp_path):
    fill(tmp_path / "store", cat=4)
    fill(root, dog=4)
    (root / "cat").symlink_to(tmp_path / "store" / "cat")
    assert build(root).classnames == ["cat", "dog"]


def test_train_val_test_folders_are_the_split(root):
    fill(root, train__b=3, train__a=2, val__a=1, test__b=2)
    dataset = build(root)
    assert dataset.classnames == ["a", "b"] and sizes(dataset) == (5, 1, 2)
    assert paths(dataset, "test") == ["test/b/00.png", "test/b/01.png"]
    assert not (root / "split.json").exists()  # nothing was drawn
    Image.new("RGB", (4, 4)).save(root / "test" / "a.png")
    fill(root, test__a=1)
    assert sizes(build(root)) == (5, 1, 3)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ({"train__a": 20, "train__b": 20, "test__a": 3, "test__b": 3}, (32, 8, 6)),
        ({"train__a": 20, "train__b": 20, "valid__a": 3, "valid__b": 3}, (28, 6, 12)),
        ({"train__a": 20, "train__b": 20}, (22, 6, 12)),  # 6 of 20 for test, then 3 of 14 for val
        ({"train__a": 3, "train__b": 3, "test__a": 1}, (6, 0, 1)),  # too few to give any away
    ],
)
def test_missing_parts_come_out_of_train(root, folders, expected):
    dataset = build(fill(root, **folders))
    assert sizes(dataset) == expected
    assert (root / "split.json").is_file() and sizes(build(root)) == expected


def test_a_class_may_be_called_train(root):
    assert build(fill(root, bus=4, train=4)).classnames == ["bus", "train"]


def test_a_folder_that_cannot_be_written(root, own_cache, monkeypatch):
    fill(root, cat=4, dog=4)
    from datasets import splits

    real = splits.atomic_write

    def refuse(path, *args, **kwargs):
        if Path(path).is_relative_to(root):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(splits, "atomic_write", refuse)
    first = build(root)
    assert not (root / "split.json").exists() and list(own_cache.glob("splits/*/split.json"))
    assert paths(build(root), "train_x") == paths(first, "train_x")


# ----------------------------------------------------------------------------------------------------- class names


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("classes.txt", "n01 tench\nn02 great white shark\n"),
        ("classes.txt", "n02: great white shark\n\n  n01:tench\n"),
        ("classes.txt", "n01 = tench\r\nn02\tgreat white shark"),
        ("classes.txt", "\ufeffn01,tench\nn02, great white shark\n"),
        ("classes.txt", "tench\ngreat white shark\n"),
        ("classes.json", '{"n02": "great white shark", "n01": "tench"}'),
        ("classes.json", '["tench", "great white shark"]'),
    ],
)
def test_names_from_a_file(root, file, content):
    fill(root, n02=4, n01=4)
    (root / file).write_bytes(content.encode())
    assert build(root).classnames == ["tench", "great white shark"]


def test_names_that_are_not_mentioned_and_folders_with_spaces(tmp_path):
    (tmp_path / "classes.txt").write_text("red fox Vulpes vulpes\nred: color\n")
    assert class_names(tmp_path, ["owl", "red", "red fox"]) == {
        "owl": "owl",
        "red": "color",
        "red fox": "Vulpes vulpes",
    }


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"classes.txt": "cat katze\nbird vogel\n"}, ["classes.txt", "bird", "cat, dog"]),
        ({"classes.txt": "cat a\ncat b\n"}, ["classes.txt", "cat once"]),
        ({"classes.txt": "cat pet\ndog pet\n"}, ["cat", "dog", "'pet'"]),
        ({"classes.txt": "cat Gray_Fox\ndog gray fox\n"}, ["cat", "dog", "gray fox"]),
        ({"classes.txt": "a\nb\nc\n"}, ["classes.txt", '"a"']),
        ({"classes.txt": ""}, ["classes.txt", "empty"]),
        ({"classes.txt": b"\xff\xfe\xff"}, ["classes.txt", "UTF-8"]),
        ({"classes.json": "{"}, ["classes.json", "JSON"]),
        ({"classes.json": '{"cat": 1}'}, ["classes.json", "names"]),
        ({"classes.json": '{"cats": "a"}'}, ["classes.json", "cats", 'did you mean "cat"']),
        ({"classes.json": '["a"]'}, ["classes.json", "2 names", "1"]),
        ({"classes.json": '{"cat": " "}'}, ["cat", "' '"]),
        ({"classes.json": "[]", "classes.txt": "x"}, ["classes.json", "classes.txt", "both"]),
    ],
)
def test_wrong_names(root, files, words):
    fill(root, cat=4, dog=4)
    for name, content in files.items():
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(root, *words)


# ------------------------------------------------------------------------------------------------------------ CSV


@pytest.fixture
def table(root) -> Path:
    fill(root, images=12)
    lines = [f"images/{number:02d}.png,{'cat' if number % 2 else 'dog'}" for number in range(12)]
    (root / "list.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    return root / "list.csv"


def test_csv(table, root):
    dataset = build(table)
    assert dataset.classnames == ["cat", "dog"] and sizes(dataset) == (6, 2, 4)
    assert all((int(Path(i.impath).stem) % 2 == 0) == (i.label == 1) for i in dataset.train_x)
    assert (root / "list.split.json").is_file()
    assert paths(build(table), "test") == paths(dataset, "test")


def test_csv_in_its_folder_is_found_by_its_name(table, root):
    table.rename(root / "labels.csv")
    assert build(root).classnames == ["cat", "dog"]
    assert (root / "split.json").is_file()


def test_csv_with_a_split(root):
    fill(root, images=4)
    (root / "list.csv").write_text(
        "\ufeffLabel; Split ;path;note\n"
        "10;Train;images/00.png;\n"
        f"9;train;{root}/images/01.png;x\n"
        "10;test;./images/02.png;\n"
        "9;validation;images/03.png;\n"
    )
    (root / "classes.json").write_text('{"9": "nine", "10": "ten"}')
    dataset = build(root / "list.csv")
    assert dataset.classnames == ["nine", "ten"]  # numbers in the order of numbers
    assert [paths(dataset, part) for part in ("train_x", "val", "test")] == [
        ["images/00.png", "images/01.png"],
        ["images/03.png"],
        ["images/02.png"],
    ]
    assert sorted(path.name for path in root.iterdir()) == ["classes.json", "images", "list.csv"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["columns path and label", "none"]),
        ("file,class\na.png,b\n", ["columns path and label", "file, class"]),
        ("path,label\nimages/00.png,\n", ["line 2", "label"]),
        ("path,label\n,cat\n", ["line 2", "path"]),
        ("path,label\nimages/00.png\n", ["line 2", "label"]),
        ("path,label\nimages/00.png,cat,dog\n", ["line 2", "cells", "dog"]),
        ("path,label\n../00.png,cat\n", ["line 2", "../00.png"]),
        ("path,label\n/etc/00.png,cat\n", ["line 2", "/etc/00.png"]),
        ("path,label\nimages/00.png,cat\nimages/00.png,dog\n", ["line 3", "images/00.png"]),
        ("path,label,split\nimages/00.png,cat,tset\n", ["line 2", "tset"]),
        ("path,label,split\nimages/00.png,cat,train\nimages/01.png,cat,\n", ["images/01.png has none"]),
        ("path,label,split\nimages/00.png,cat,train\nimages/01.png,dog,train\nimages/02.png,cow,test\n", ["cow"]),
        ('path,label\n"images/00.png,cat\n', ["list.csv", "CSV"]),
        (b"path,label\n\xff.png,cat\n", ["list.csv", "UTF-8"]),
        ("path,label\n" + "".join(f"images/{i:02d}.png,cat\n" for i in range(8)), ["two classes"]),
        ("path,label\n" + "".join(f"gone/{i:02d}.png,{'ab'[i % 2]}\n" for i in range(8)), ["8 of 8", "gone/"]),
    ],
)
def test_wrong_csv(table, root, content, words):
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(table, *words)


def test_a_header_that_no_csv_file_has_is_an_input_error(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("path," + "x" * 200_000 + "\na.png,cat\n")  # the csv module refuses such a cell
    with pytest.raises(InputError, match="to be CSV but got: field larger"):
        read_csv(path)


def test_csv_rows_keep_their_order(table):
    assert [photo.path for photo in read_csv(table)][:2] == ["images/00.png", "images/01.png"]


# --------------------------------------------------------------------------------------------------------- errors


def assert_refused(root: Path, *words: str) -> None:
    """An InputError of one line with these words; no split and no half-written file is left."""
    before = sorted(root.parent.rglob("*")) if root.suffix else sorted(root.rglob("*"))
    with pytest.raises(InputError) as caught:
        build(root)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    after = sorted(root.parent.rglob("*")) if root.suffix else sorted(root.rglob("*"))
    assert after == before


def test_few_photos_in_some_classes(root):
    fill(root, cat=2, dog=20, owl=3)
    assert_refused(root, "at least 4 images", "cat (2), owl (3)", "Add images")


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        ({"cat": 4, "dog": 0}, ["my photos/dog", "nothing"]),
        ({"cat": 4}, ["two classes", "1"]),
        ({"": 3}, ["one folder of images per class", "3 images"]),
        ({"train__a": 4, "train__b": 4, "test__c": 1}, ["test", '"c"']),
        ({"train__a": 4, "train__b": 0, "test__a": 1}, ["train/b", "nothing"]),
        ({"train__a": 2, "train__b": 2}, ["images in test"]),
        ({"gray fox": 4, "Gray_fox": 4}, ["gray fox", "Gray_fox", "tell apart"]),
    ],
)
def test_wrong_folders(root, folders, words):
    assert_refused(fill(root, **folders), *words)


def test_a_class_folder_with_files_of_other_kinds_only(root):
    fill(root, cat=4, dog=0)
    (root / "dog" / "IMG_1.heic").touch()
    assert_refused(root, "my photos/dog", ".heic (1)")


def test_an_empty_folder_and_roots_that_are_none(root, tmp_path):
    root.mkdir()
    assert_refused(root, "one folder of images per class", "nothing")
    (tmp_path / "photos.zip").touch()
    for path, word in ((tmp_path / "photos.zip", "photos.zip"), (tmp_path / "no", "not there"), (Path(), "--root")):
        with pytest.raises(InputError, match=word):
            build("" if path == Path() else path)


def test_loops_of_links(root):
    fill(root, cat=4, dog=4)
    (root / "cat" / "again").symlink_to(root / "cat")
    assert_refused(root, "cat/again", "leads back")
    (root / "cat" / "again").unlink()
    (root / "owl").symlink_to(root / "owl")
    assert_refused(root, "owl")
    (root / "owl").unlink()
    (root / "cat" / "gone.png").symlink_to(root / "nothing.png")
    assert_refused(root, "cat/gone.png")


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_names_that_are_not_utf8(root):
    fill(root, cat=4, dog=4)
    os.makedirs(os.fsencode(root) + b"/caf\xe9")
    assert_refused(root, "UTF-8", r"caf\xe9")
    os.rmdir(os.fsencode(root) + b"/caf\xe9")
    with open(os.fsencode(root) + b"/cat/\xe9.png", "wb"):
        assert_refused(root, "UTF-8", r"\xe9.png")


def test_a_split_that_fits_no_longer(root):
    build(fill(root, cat=4, dog=4))
    fill(root, bird=4)  # moves the labels of the others
    assert_refused(root, "split.json", "'cat' (label 0)", "'cat' (label 1)", "Delete split.json")
    shutil.rmtree(root / "bird")
    fill(root, zebra=4)
    assert_refused(root, "split.json", "zebra", "none of its classes")
    shutil.rmtree(root / "zebra")
    (root / "classes.txt").write_text("cat kitten\n")
    assert_refused(root, "split.json", "kitten")
    (root / "classes.txt").unlink()
    (root / "dog" / "01.png").unlink()
    assert_refused(root, "1 of 8", "dog/01.png", "delete", "split.json")
    (root / "split.json").write_text('{"train": [')
    assert_refused(root, "split.json")

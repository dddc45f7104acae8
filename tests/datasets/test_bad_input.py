"""What a user can get wrong with a dataset, one by one: messages name the culprit, no half-written file is left.

Bad images and folders of one's own images have tests of their own.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dataset_trees import make_tree, write_folder, write_image, write_text
from scipy.io import savemat

from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from dassl.utils import InputError
from datasets import extend_cfg
from trainers.app import train

SPLIT = "split_zhou_EuroSAT.json"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLR_CLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def build(name: str, root: Path | str, *pairs: Any):
    cfg = get_cfg_default()
    extend_cfg(cfg)
    cfg.merge_from_list(["DATASET.ROOT", str(root), "SEED", 1, *pairs])
    return DATASET_REGISTRY.get(name)(cfg)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(name: str, root: Path | str, *words: str, pairs: tuple[Any, ...] = ()) -> str:
    """Build a reader that must refuse, naming all `words` and leaving the folder as it was; the message."""
    before = files(Path(root)) if root and Path(root).is_dir() else None
    with pytest.raises(InputError) as caught:
        build(name, root, *pairs)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert message.startswith("Expected ")
    if before is not None:
        assert files(Path(root)) == before
    return message


# --------------------------------------------------------------------------------------------- roots and folders


def test_no_root():
    refused("EuroSAT", "", "--root", "eurosat", "docs/DATASETS.md, section EuroSAT")


def test_missing_root(tmp_path):
    refused("EuroSAT", tmp_path / "nowhere", f"{tmp_path}/nowhere does not exist", "section EuroSAT")


def test_root_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    refused("EuroSAT", tmp_path / "file", f"{tmp_path}/file is no folder")


def test_root_without_the_dataset(data):
    refused("ImageNetA", data, f"{data}/imagenet-adversarial does not exist", "section ImageNetA")


def test_root_with_a_strange_name(tmp_path):
    refused("EuroSAT", "a\0b", "does not exist")


# --------------------------------------------------------------------------------------------- missing files


def test_neither_split_file_nor_its_sources(data):
    (data / "eurosat").mkdir()
    refused("EuroSAT", data, SPLIT, "1 of 1 are missing", f"{data}/eurosat/2750", "section EuroSAT")
    (data / "stanford_cars" / "cars_train").mkdir(parents=True)
    refused("StanfordCars", data, "4 of 5 are missing", "cars_test_annos_withlabels.mat", "devkit/cars_meta.mat")


def test_missing_lists(data):
    make_tree("FGVCAircraft", data)
    (data / "fgvc_aircraft" / "variants.txt").unlink()
    refused("FGVCAircraft", data, "1 of 5 are missing", "fgvc_aircraft/variants.txt", "section FGVCAircraft")


def test_missing_images_are_counted_and_the_first_five_named(data):
    make_tree("EuroSAT", data)
    split = json.loads(Path(build("EuroSAT", data).dataset_dir, SPLIT).read_text())
    gone = [item[0] for item in split["train"][:7]]
    for path in gone:
        (data / "eurosat" / "2750" / path).unlink()
    message = refused("EuroSAT", data, "EuroSAT", "7 of 40", *gone[:5], "section EuroSAT")
    assert gone[5] not in message
    # Also those that a few-shot run would not have picked.
    refused("EuroSAT", data, "7 of 40", pairs=("DATASET.NUM_SHOTS", 1))


def test_missing_image_folder_with_a_split_file(data):
    make_tree("EuroSAT", data)
    build("EuroSAT", data)
    shutil.rmtree(data / "eurosat" / "2750")
    refused("EuroSAT", data, "40 of 40", f"{data}/eurosat/2750/")


def test_image_of_a_list_that_is_not_there(data):
    make_tree("OxfordPets", data)
    (data / "oxford_pets" / "images" / "Abyssinian_3.jpg").unlink()
    refused("OxfordPets", data, "OxfordPets", "1 of 48", "Abyssinian_3.jpg", "section OxfordPets")


def test_missing_classnames(data):
    make_tree("ImageNetSketch", data)
    (data / "imagenet-sketch" / "classnames.txt").unlink()
    refused("ImageNetSketch", data, "1 of 2", "imagenet-sketch/classnames.txt", "imagenet/classnames.txt")
    shutil.rmtree(data / "imagenet-sketch" / "images")
    refused("ImageNetSketch", data, "2 of 2", "imagenet-sketch/images", "section ImageNetSketch")


def test_missing_class_folders_of_v2(data):
    make_tree("ImageNetV2", data)
    images = data / "imagenetv2" / "imagenetv2-matched-frequency-format-val"
    shutil.rmtree(images / "2")
    refused("ImageNetV2", data, "1 of 4", f"{images}/2", "section ImageNetV2")


# --------------------------------------------------------------------------------------------- split files


def spoilt_split(data: Path, change: Callable[[dict[str, list]], Any]) -> None:
    make_tree("EuroSAT", data)
    build("EuroSAT", data)
    file = data / "eurosat" / SPLIT
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("test"), ["test is absent"]),
        (lambda c: c["train"].__setitem__(3, "River/River_1.jpg"), ["train[3]", "'River/River_1.jpg'"]),
        (lambda c: c["train"][0].__setitem__(1, "river"), ["train[0]", "integer label", "'river'"]),
        (lambda c: c["train"][0].__setitem__(1, None), ["train[0]", "integer label", "None"]),
        (lambda c: c["val"][1].__setitem__(1, -3), ["val[1]", "integer label", "-3"]),
        (lambda c: [i.__setitem__(1, 9) for p in c.values() for i in p if i[1] == 2], ["label 2 has none"]),
        (lambda c: c["test"][0].__setitem__(1, 10**15), [f"to {10**15} but label 4 has none"]),
        (lambda c: c["test"].append(["a.jpg", 10**15, "far"]), [f"from 0 to {10**15} but label 4 has none"]),
        (lambda c: c["test"][0].__setitem__(2, "Sea"), ["one class name", "'Sea'"]),
        (lambda c: c["test"][0].__setitem__(2, " "), ["test[0]", "class name", "' '"]),
        (lambda c: c["test"].append(c["train"][0]), ["each image once", "in train and in test"]),
        (lambda c: c["val"].append(c["val"][0]), ["each image once", "in val and in val (twice)"]),
        (lambda c: c["train"][0].__setitem__(0, "../../secret.jpg"), ["train[0]", "inside", "'../../secret.jpg'"]),
        (lambda c: c["train"][0].__setitem__(0, "/etc/passwd"), ["train[0]", "inside", "'/etc/passwd'"]),
        (lambda c: c["train"][0].__setitem__(0, "River/\udcff.jpg"), ["train[0]", "UTF-8", r"River/\xff.jpg"]),
        (lambda c: c.update(train=[]), ["train but it is empty"]),
    ],
)
def test_wrong_content_of_a_split_file(data, change, words):
    spoilt_split(data, change)
    refused("EuroSAT", data, SPLIT, *words)


@pytest.mark.parametrize(
    "raw", [b"", b'{"train": [', b"\xff\xfe\x00", b"[1, 2]", b"[" * 100_000, b"<html>login</html>"]
)
def test_malformed_split_file(data, raw):
    make_tree("EuroSAT", data)
    (data / "eurosat" / SPLIT).write_bytes(raw)
    refused("EuroSAT", data, SPLIT)


def test_split_file_that_is_a_folder(data):
    make_tree("EuroSAT", data)
    (data / "eurosat" / SPLIT).mkdir()
    refused("EuroSAT", data, SPLIT, "Is a directory")


# --------------------------------------------------------------------------------------------- class folders


def test_class_with_one_image(data):
    make_tree("EuroSAT", data)
    write_image(data / "eurosat" / "2750" / "Lonely" / "a.jpg")
    refused("EuroSAT", data, "2750/Lonely", "got 1")


def test_class_with_one_image_in_a_list(data):
    make_tree("OxfordPets", data)
    file = data / "oxford_pets" / "annotations" / "trainval.txt"
    lines = [line for line in file.read_text().splitlines() if " 2 1 " not in line]
    file.write_text("\n".join([*lines, "Egyptian_Mau_1 2 1 2"]))
    refused("OxfordPets", data, "'egyptian_mau'", "got 1")


def test_class_folder_without_an_image(data):
    make_tree("EuroSAT", data)
    write_text(data / "eurosat" / "2750" / "Hollow" / "notes.txt", "nothing to see")
    refused("EuroSAT", data, "2750/Hollow", "got 0")
    make_tree("ImageNet", data)
    folder = data / "imagenet" / "images" / "val" / "n01440764"
    shutil.rmtree(folder)
    folder.mkdir()
    refused("ImageNet", data, str(folder), "'tench'", "none")
    make_tree("ImageNetR", data)
    folder = data / "imagenet-rendition" / "imagenet-r" / "n01440764"
    shutil.rmtree(folder)
    folder.mkdir()
    refused("ImageNetR", data, str(folder), "'tench'", "none")


def test_no_class_folder_at_all(data):
    write_folder(data / "food-101" / "images", 5)
    refused("Food101", data, "food-101/images", "one folder per class")


def test_loop_of_links_where_a_class_should_be(data):
    make_tree("EuroSAT", data)
    link = data / "eurosat" / "2750" / "Loop"
    link.symlink_to(link)
    refused("EuroSAT", data, "2750/Loop", "symbolic links")


def test_link_to_the_folder_above_is_no_endless_walk(data):
    make_tree("EuroSAT", data)
    (data / "eurosat" / "2750" / "River" / "up").symlink_to(data / "eurosat" / "2750")
    assert build("EuroSAT", data).num_classes == 4


def test_broken_link_to_a_class_folder(data):
    make_tree("ImageNetA", data)
    (data / "imagenet-adversarial" / "imagenet-a" / "n01440764").symlink_to(data / "gone")
    refused("ImageNetA", data, "imagenet-a/n01440764", "No such file")


def test_image_that_is_a_loop_of_links_counts_as_missing(data):
    make_tree("EuroSAT", data)
    build("EuroSAT", data)
    image = data / "eurosat" / "2750" / "River" / "River_1.jpg"
    image.unlink()
    image.symlink_to(image)
    refused("EuroSAT", data, "1 of 40", str(image))


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
@pytest.mark.parametrize("where", ["2750/River/a\udcff.jpg", "2750/b\udce9t\udce9/a.jpg"])
def test_name_that_is_not_utf8(data, where):
    make_tree("EuroSAT", data)
    path = data / "eurosat" / where
    try:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    message = refused("EuroSAT", data, "UTF-8", str(data / "eurosat" / "2750"))
    assert r"\xff" in message or r"\xe9" in message
    message.encode()  # it can be printed and logged


def test_names_with_slashes_and_spaces_are_fine(data):
    make_tree("FGVCAircraft", data)
    make_tree("StanfordCars", data)
    assert "F-16A/B" in build("FGVCAircraft", data).classnames
    assert "2012 Ram C/V Cargo Van Minivan" in build("StanfordCars", data, "DATASET.NUM_SHOTS", 1).classnames


# --------------------------------------------------------------------------------------------- annotation files


def lines(*content: str) -> Callable[[Path], Any]:
    return lambda path: write_text(path, *content)


@pytest.mark.parametrize(
    ("name", "file", "spoil", "words"),
    [
        ("OxfordPets", "oxford_pets/annotations/trainval.txt", lines("Abyssinian_1 1 1"), ["'Abyssinian_1 1 1'"]),
        ("OxfordPets", "oxford_pets/annotations/test.txt", lines("Abyssinian_1 one 1 1"), ["number", "one 1 1"]),
        ("OxfordPets", "oxford_pets/annotations/test.txt", lines(), ["empty"]),
        ("OxfordPets", "oxford_pets/annotations/test.txt", lambda p: p.write_bytes(b"\xff\xff"), ["UTF-8"]),
        ("OxfordPets", "oxford_pets/annotations/test.txt", lines("Bengal_1 9 1 1"), ["label 3 has none"]),
        ("SUN397", "sun397/Training_01.txt", lines("/a/attic/sun_1.jpg"), ["'/a/attic/sun_1.jpg'"]),
        ("UCF101", "ucf101/ucfTrainTestlist/classInd.txt", lines("ApplyEyeMakeup 1"), ["'ApplyEyeMakeup 1'"]),
        ("UCF101", "ucf101/ucfTrainTestlist/testlist01.txt", lines("Diving/v_1.avi"), ["'Diving/v_1.avi'"]),
        ("FGVCAircraft", "fgvc_aircraft/images_variant_val.txt", lines("0000001 Concorde"), ["'Concorde'"]),
        ("FGVCAircraft", "fgvc_aircraft/images_variant_val.txt", lines("0000001"), ["'0000001'"]),
        (
            "FGVCAircraft",
            "fgvc_aircraft/images_variant_val.txt",
            lines("0000000 Falcon 900"),
            ["in train and in val", "0000000.jpg"],
        ),
        ("OxfordFlowers", "oxford_flowers/cat_to_name.json", lambda p: p.write_text('{"1": "rose"}'), ["class 3"]),
        ("OxfordFlowers", "oxford_flowers/cat_to_name.json", lambda p: p.write_text("{"), ["JSON"]),
        ("OxfordFlowers", "oxford_flowers/imagelabels.mat", lambda p: p.write_bytes(b"MATLAB"), ["MATLAB file"]),
        ("OxfordFlowers", "oxford_flowers/imagelabels.mat", lambda p: savemat(p, {"a": 1}), ["labels", "got a"]),
        ("StanfordCars", "stanford_cars/devkit/cars_meta.mat", lambda p: savemat(p, {"class_names": []}), ["1 to 0"]),
        ("StanfordCars", "stanford_cars/devkit/cars_train_annos.mat", lambda p: savemat(p, {"annotations": 3}), ["0"]),
        ("ImageNet", "imagenet/classnames.txt", lines("n01440764"), ["'n01440764'"]),
        ("ImageNet", "imagenet/classnames.txt", lines("n1 cat", "n1 dog"), ["n1", "'cat'", "'dog'"]),
        ("ImageNet", "imagenet/classnames.txt", lines("n01440764 tench"), ["3 are not", "n02106662"]),
        ("ImageNetA", "imagenet-adversarial/classnames.txt", lines("n01440764 tench"), ["2 are not", "n02106662"]),
    ],
)
def test_faulty_annotation_file(data, name, file, spoil, words):
    make_tree(name, data)
    spoil(data / file)
    refused(name, data, str(data / file.split("/")[0]), *words)


def test_train_and_val_of_imagenet_with_other_classes(data):
    make_tree("ImageNet", data)
    shutil.rmtree(data / "imagenet" / "images" / "val" / "n01440764")
    refused("ImageNet", data, "images/train", "images/val", "1 of 4", "n01440764")


# --------------------------------------------------------------------------------------------- settings and picks


@pytest.mark.parametrize("shots", [0, -5, 6])
def test_shots_that_cannot_be(data, shots):
    make_tree("EuroSAT", data)
    build("EuroSAT", data)
    refused("EuroSAT", data, "NUM_SHOTS", f"got {shots}", pairs=("DATASET.NUM_SHOTS", shots))


def test_half_that_is_none(data):
    make_tree("EuroSAT", data)
    build("EuroSAT", data)
    refused("EuroSAT", data, "all, base or new", "'old'", pairs=("DATASET.SUBSAMPLE_CLASSES", "old"))


class Hostile:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_hostile_pickle(data, tmp_path):
    make_tree("EuroSAT", data)
    build("EuroSAT", data)
    (data / "eurosat" / "split_fewshot").mkdir()
    file = data / "eurosat" / "split_fewshot" / "shot_1-seed_1.pkl"
    file.write_bytes(pickle.dumps({"train": Hostile(str(tmp_path / "ran"))}))
    refused("EuroSAT", data, str(file), "mkdir", pairs=("DATASET.NUM_SHOTS", 1))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("items", [[], [["River/River_1.jpg", 2, "River"]]])
def test_pick_file_that_lacks_classes_is_drawn_again(data, items, caplog):
    make_tree("EuroSAT", data)
    first = build("EuroSAT", data, "DATASET.NUM_SHOTS", 1)
    file = data / "eurosat" / "split_fewshot" / "shot_1-seed_1.json"
    content = json.loads(file.read_text())
    content["train"] = [item for item in content["train"] if item in items]
    file.write_text(json.dumps(content))
    second = build("EuroSAT", data, "DATASET.NUM_SHOTS", 1)
    assert "shot_1-seed_1.json does not fit" in caplog.text and "no image of label" in caplog.text
    assert second.train_x == first.train_x


def test_dataset_folder_that_cannot_be_written_to(data, tmp_path, monkeypatch):
    """Nothing is lost: split and picks go to the user's cache."""
    make_tree("EuroSAT", data)
    before = files(data)
    opened = open

    def refuse(path, mode="r", *args, **kwargs):
        if str(path).startswith(str(data)) and set(mode) & set("wxa"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)  # root may write anywhere, so the modes of files would not do
    monkeypatch.setattr(Path, "mkdir", _refusing(Path.mkdir, data))
    first = build("EuroSAT", data, "DATASET.NUM_SHOTS", 2)
    assert files(data) == before
    kept = {path.name for path in (tmp_path / "cache").rglob("*.json")}
    assert kept == {SPLIT, "shot_2-seed_1.json"}
    second = build("EuroSAT", data, "DATASET.NUM_SHOTS", 2)
    assert (second.train_x, second.split_digest) == (first.train_x, first.split_digest)


def _refusing(mkdir: Callable[..., None], folder: Path) -> Callable[..., None]:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        if str(self).startswith(str(folder)) and not self.exists():
            raise PermissionError(13, "Permission denied", str(self))
        mkdir(self, *args, **kwargs)

    return refuse


# --------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: shutil.rmtree(root), ["does not exist"]),
        (lambda root: (root / "eurosat" / SPLIT).write_text("{"), [SPLIT]),
        (lambda root: (root / "eurosat" / "2750" / "River" / "River_1.jpg").unlink(), ["1 of 40", "River_1.jpg"]),
        (lambda root: shutil.rmtree(root / "eurosat" / "2750"), ["40 of 40"]),
    ],
)
def test_train_says_it_in_one_line_and_exits_with_2(data, tmp_path, capsys, spoil, words, random_tiny):
    make_tree("EuroSAT", data)
    build("EuroSAT", data)
    spoil(data)
    checkout = Path(train.__file__).parents[2]
    output = tmp_path / "runs" / "first"
    code = train.main(
        [
            *("--root", str(data), "--trainer", "DLRCLIP", "--output-dir", str(output), "--seed", "1"),
            *("--config-file", str(checkout / "configs" / "trainers" / "dlr" / "tiny.yaml")),
            *("--dataset-config-file", str(checkout / "configs" / "datasets" / "eurosat.yaml")),
            *("MODEL.BACKBONE.WEIGHTS", str(random_tiny), "USE_CUDA", "False", "DATASET.NUM_SHOTS", "1"),
        ]
    )
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert error.startswith("error: Expected ") and "\n" not in error
    assert [word for word in (*words, "section EuroSAT" if "JSON" not in error else SPLIT) if word not in error] == []
    assert not (tmp_path / "runs").exists()

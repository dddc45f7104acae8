"""Miniature trees of the fifteen benchmarks: official layout and annotation files, real images, a few classes.

`make_tree(name, root)` writes one, without a split file. The trees hold what the real ones hold and what readers trip
over: folders to be ignored, hidden entries, stray files, names to be changed, classes in an order that is not sorted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

CLASSNAMES = {
    "n04008634": "missile",  # the list is not sorted, and two classes share a name
    "n01440764": "tench",
    "n03773504": "missile",
    "n02106662": "German Shepherd Dog",
}
WNIDS = sorted(CLASSNAMES)  # tench, German Shepherd Dog, missile, missile

_drawn = 0


def write_image(path: Path) -> None:
    """A small image of a color of its own; the format follows from the name."""
    global _drawn
    _drawn += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    color = (_drawn * 37 % 256, _drawn * 91 % 256, _drawn * 151 % 256)
    Image.new("RGB", (40, 32), color).save(path)


def write_folder(folder: Path, count: int, pattern: str = "image_{:04d}.jpg") -> None:
    for number in range(1, count + 1):
        write_image(folder / pattern.format(number))


def write_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def caltech101(root: Path) -> None:
    images = root / "caltech-101" / "101_ObjectCategories"
    counts = {"accordion": 13, "Faces": 10, "Motorbikes": 5, "BACKGROUND_Google": 4, "Faces_easy": 4, "water_lilly": 30}
    for folder, count in counts.items():
        write_folder(images / folder, count)
    write_image(images / "Faces" / ".hidden.jpg")
    write_image(images / ".git" / "a.jpg")
    write_text(images / "README.txt", "about")
    write_text(images / "accordion" / "tmp", "left over")


def food101(root: Path) -> None:
    for folder in ("waffles", "apple_pie", "pad_thai"):
        write_folder(root / "food-101" / "images" / folder, 10, "{:06d}.jpg")
    write_text(root / "food-101" / "meta" / "train.txt", "apple_pie/000001")


def dtd(root: Path) -> None:
    for folder in ("polka-dotted", "banded", "woven"):
        write_folder(root / "dtd" / "images" / folder, 10, folder + "_{:04d}.jpg")
    write_text(root / "dtd" / "labels" / "train1.txt", "banded/banded_0001.jpg")


def eurosat(root: Path) -> None:
    for folder in ("SeaLake", "AnnualCrop", "Highway", "River"):
        write_folder(root / "eurosat" / "2750" / folder, 10, folder + "_{}.jpg")


FLOWER_LABELS = [3] * 5 + [1] * 13 + [2] * 10  # of image 1, 2, ...: classes out of order


def oxford_flowers(root: Path) -> None:
    folder = root / "oxford_flowers"
    write_folder(folder / "jpg", len(FLOWER_LABELS), "image_{:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([FLOWER_LABELS], dtype=np.uint8)})
    names = {"1": "pink primrose", "2": "bird of paradise", "3": "hard-leaved pocket orchid"}
    (folder / "cat_to_name.json").write_text(json.dumps(names))


def oxford_pets(root: Path) -> None:
    folder = root / "oxford_pets"
    lists: dict[str, list[str]] = {"trainval": ["# made by hand"], "test": []}
    for breed, label in (("Egyptian_Mau", 2), ("Abyssinian", 1), ("english_cocker_spaniel", 3)):
        for number in range(1, 17):
            write_image(folder / "images" / f"{breed}_{number}.jpg")
            part = "trainval" if number <= 12 else "test"
            lists[part].append(f"{breed}_{number} {label} 1 {label}")
    for part, lines in lists.items():
        write_text(folder / "annotations" / f"{part}.txt", *lines)
    write_text(folder / "images" / "Abyssinian_100.mat", "as in the official archive")


CARS = ("AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "Audi TTS Coupe 2012")


def cars_annotations(rows: list[tuple[str, int]]) -> dict[str, Any]:
    annotations = np.zeros((1, len(rows)), dtype=[("class", object), ("fname", object)])
    for number, (name, label) in enumerate(rows):
        annotations[0, number] = (np.array([[label]], dtype=np.uint8), name)
    return {"annotations": annotations}


def stanford_cars(root: Path) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    rows = {}
    for part, count in (("train", 24), ("test", 6)):
        write_folder(folder / f"cars_{part}", count, "{:05d}.jpg")
        rows[part] = [(f"{number:05d}.jpg", (3, 1, 2)[number % 3]) for number in range(1, count + 1)]
    savemat(folder / "devkit" / "cars_train_annos.mat", cars_annotations(rows["train"]))
    savemat(folder / "cars_test_annos_withlabels.mat", cars_annotations(rows["test"]))
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([CARS], dtype=object)})


def sun397(root: Path) -> None:
    folder = root / "sun397"
    scenes = ("a/abbey", "a/apartment_building/outdoor", "z/zen_garden")
    lists: dict[str, list[str]] = {"Training_01": [], "Testing_01": []}
    for scene in reversed(scenes):
        for number in range(15):
            write_image(folder / "SUN397" / scene / f"sun_{number:04d}.jpg")
            lists["Training_01" if number < 10 else "Testing_01"].append(f"/{scene}/sun_{number:04d}.jpg")
    write_text(folder / "ClassName.txt", *(f"/{scene}" for scene in scenes))
    for name, lines in lists.items():
        write_text(folder / f"{name}.txt", *lines)


def ucf101(root: Path) -> None:
    folder = root / "ucf101"
    # Not sorted by code point: Hammering stands before HammerThrow.
    actions = {"ApplyEyeMakeup": 1, "Hammering": 2, "HammerThrow": 3, "YoYo": 4}
    shown = ("Apply_Eye_Makeup", "Hammering", "Hammer_Throw", "Yo_Yo")
    train, test = [], []
    for (action, label), name in zip(actions.items(), shown, strict=True):
        for number in range(13):
            write_image(folder / "UCF-101-midframes" / name / f"v_{action}_g{number:02d}_c01.jpg")
            video = f"{action}/v_{action}_g{number:02d}_c01.avi"
            if number < 10:
                train.append(f"{video} {label}")
            else:
                test.append(video)
    lists = folder / "ucfTrainTestlist"
    write_text(lists / "classInd.txt", *(f"{label} {action}" for action, label in actions.items()))
    write_text(lists / "trainlist01.txt", *train)
    write_text(lists / "testlist01.txt", *test)


VARIANTS = ("707-320", "F-16A/B", "Falcon 900")


def fgvc_aircraft(root: Path) -> None:
    folder = root / "fgvc_aircraft"
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for number in range(36):
        write_image(folder / "images" / f"{number:07d}.jpg")
        part = ("train", "train", "val", "test")[number // 3 % 4]
        lists[part].append(f"{number:07d} {VARIANTS[(2, 0, 1)[number % 3]]}")
    write_text(folder / "variants.txt", *VARIANTS)
    for part, lines in lists.items():
        write_text(folder / f"images_variant_{part}.txt", *lines)


def write_classnames(folder: Path) -> None:
    write_text(folder / "classnames.txt", *(f"{wnid} {name}" for wnid, name in CLASSNAMES.items()))


def imagenet(root: Path) -> None:
    folder = root / "imagenet"
    for wnid in WNIDS:
        write_folder(folder / "images" / "train" / wnid, 12, wnid + "_{}.JPEG")
        write_folder(folder / "images" / "val" / wnid, 3, f"ILSVRC2012_val_{wnid}" + "_{:08d}.JPEG")
    write_text(folder / "images" / "train" / "README.txt", "stray")
    write_classnames(folder)


def imagenetv2(root: Path) -> None:
    images = root / "imagenetv2" / "imagenetv2-matched-frequency-format-val"
    for label in range(len(WNIDS)):
        write_folder(images / str(label), 3, "{:02d}.jpeg")
    write_classnames(root / "imagenetv2")


def imagenet_sketch(root: Path) -> None:
    for wnid in WNIDS:
        write_folder(root / "imagenet-sketch" / "images" / wnid, 3, "sketch_{}.JPEG")
    write_classnames(root / "imagenet-sketch")


def imagenet_a(root: Path) -> None:
    images = root / "imagenet-adversarial" / "imagenet-a"
    for wnid in WNIDS[1::2]:  # German Shepherd Dog and the second missile
        write_folder(images / wnid, 3, "0.00_{}.jpg")
    write_text(images / "README.txt", "about")
    write_classnames(root / "imagenet-adversarial")


def imagenet_r(root: Path) -> None:
    images = root / "imagenet-rendition" / "imagenet-r"
    for wnid in WNIDS[::2]:  # tench and the first missile
        write_folder(images / wnid, 3, "art_{}.jpg")
    write_text(images / "README.txt", "about")
    write_classnames(root / "imagenet-rendition")


def image_folder(root: Path) -> None:
    for name in ("red_things", "Blue things"):
        write_folder(root / name, 10)


def open_images(root: Path) -> None:
    rows = []
    for number in range(16):
        write_image(root / "open_images" / "images" / f"train_{number % 3}" / f"{number:016x}.jpg")
        rows.append(f"{number:016x},{('Tree', 'Cat, tabby')[number % 2]}".replace("Cat, tabby", '"Cat, tabby"'))
    write_text(root / "open_images" / "labels.csv", "ImageID,LabelName", *reversed(rows))


OTHERS = ("ImageFolder", "OpenImages")  # readers that are no benchmark with published splits

TREES: dict[str, Callable[[Path], None]] = {
    "ImageNet": imagenet,
    "Caltech101": caltech101,
    "OxfordPets": oxford_pets,
    "StanfordCars": stanford_cars,
    "OxfordFlowers": oxford_flowers,
    "Food101": food101,
    "FGVCAircraft": fgvc_aircraft,
    "SUN397": sun397,
    "DescribableTextures": dtd,
    "EuroSAT": eurosat,
    "UCF101": ucf101,
    "ImageNetV2": imagenetv2,
    "ImageNetSketch": imagenet_sketch,
    "ImageNetA": imagenet_a,
    "ImageNetR": imagenet_r,
    "ImageFolder": image_folder,
    "OpenImages": open_images,
}


def make_tree(name: str, root: Path) -> None:
    """Write the tree of a benchmark under `root`, as DATASET.ROOT wants it; unknown names need none."""
    if name in TREES:
        TREES[name](root)

"""The generic sets that adapters are trained on: ShapesGeneric, and OpenImages with the script that labels it."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

import datasets
from dassl.config import get_cfg_default
from dassl.data.datasets import build_dataset
from dassl.utils import InputError
from datasets import shapes
from datasets.rendering import COLORS, SHAPE_CLASSES
from datasets.shapes_generic import CLASSES, draw_generic, draw_mask, other_color, pen_line
from scripts import prepare_open_images


def build(name, root=""):
    cfg = get_cfg_default()
    datasets.extend_cfg(cfg)
    cfg.merge_from_list(["DATASET.NAME", name, "DATASET.ROOT", str(root)])
    return build_dataset(cfg)


def test_shapes_generic_has_nothing_of_shapes():
    assert len(CLASSES) == len(set(CLASSES)) == 96
    assert not set(CLASSES) & (set(SHAPE_CLASSES) | set("0123456789"))
    rng = np.random.default_rng(0)
    taken = np.array([COLORS[name] for name in shapes.COLORS])
    for _ in range(200):
        color = other_color(rng)
        assert np.linalg.norm(taken - color, axis=1).min() >= 60
        assert np.linalg.norm(other_color(rng, unlike=color) - color) >= 90


@pytest.mark.parametrize("label", [0, 47, 48, 95])
def test_a_member_follows_its_generator_and_differs_from_the_next(label):
    first, second = (np.asarray(draw_generic(label, np.random.default_rng(seed))) for seed in (1, 2))
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, np.asarray(draw_generic(label, np.random.default_rng(1))))
    assert not np.array_equal(first, second)
    assert 0.01 < draw_mask(label, np.random.default_rng(1)).mean() < 0.8


def test_members_of_a_class_are_alike():
    """Distance of two members' points: less than that of two classes'. A loop ends where it began."""
    lines = [[pen_line(label, np.random.default_rng(seed)) for seed in range(8)] for label in range(0, 96, 8)]
    pairs = list(zip(lines, lines[1:], strict=False))
    within = np.mean([np.abs(np.array(own[:4]) - np.array(own[4:])).mean() for own, _ in pairs])
    across = np.mean([np.abs(np.array(own[:4]) - np.array(other[4:])).mean() for own, other in pairs])
    assert within < 0.6 * across
    for label, own in zip(range(0, 96, 8), lines, strict=True):
        assert np.allclose(own[0][0], own[0][-1]) == CLASSES[label].startswith("loop")


def write_labels(folder, rows, columns=("ImageID", "LabelName")):
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture
def tree(tmp_path):
    """40 cats and 3 dogs, in folders as the official archives have them."""
    folder = tmp_path / "open_images"
    rows = []
    for i in range(43):
        place = folder / "images" / f"train_{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (i, 0, 0)).save(place / f"id{i:02d}.jpg")
        rows.append((f"id{i:02d}", "Dog" if i < 3 else "Cat"))
    write_labels(folder, rows)
    return tmp_path


def test_open_images_reads_a_label_per_image(tree):
    dataset = build("OpenImages", tree)
    assert dataset.classnames == ["Cat", "Dog"]
    sizes = [
        [sum(item.label == label for item in part) for label in (0, 1)]
        for part in (dataset.train_x, dataset.val, dataset.test)
    ]
    assert sizes == [[36, 1], [2, 1], [2, 1]]
    assert {item.impath.rsplit("/", 1)[1] for item in dataset.train_x + dataset.val + dataset.test} == {
        f"id{i:02d}.jpg" for i in range(43)
    }
    again = build("OpenImages", tree)  # from the saved split
    assert [item.impath for item in again.test] == [item.impath for item in dataset.test]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("id00", "Cat"), ("gone", "Cat")], ("ImageID", "LabelName"), "1 of 2 are missing, such as gone"),
        ([("id00", "Cat"), ("id00", "Dog")], ("ImageID", "LabelName"), "line 3 repeats id00"),
        ([("id00", "")], ("ImageID", "LabelName"), "to have an id and a label"),
        ([("id00", "Cat")], ("ImageID", "Label"), "to have the columns ImageID and LabelName"),
    ],
)
def test_faulty_labels_are_named(tree, rows, columns, message):
    write_labels(tree / "open_images", rows, columns)
    with pytest.raises(InputError, match=message):
        build("OpenImages", tree)


def test_two_images_of_one_id_are_refused(tree):
    Image.new("RGB", (40, 40)).save(tree / "open_images" / "images" / "id00.png")
    with pytest.raises(InputError, match="Expected one image of the id id00"):
        build("OpenImages", tree)


def test_the_rarest_confirmed_label_is_taken():
    confirmed = {"a": ["Animal", "Cat"], "b": ["Animal"], "c": ["Cat", "Animal"], "d": ["Zebra", "Ape"]}
    chosen = prepare_open_images.one_label_each(confirmed)
    assert chosen == {"a": "Cat", "b": "Animal", "c": "Cat", "d": "Ape"}
    assert prepare_open_images.one_label_each(confirmed, 2) == {"a": "Cat", "c": "Cat"}


def test_script_turns_the_official_files_into_labels(tree, tmp_path, capsys):
    (tree / "open_images" / "labels.csv").unlink()
    (tmp_path / "classes.csv").write_text('LabelName,DisplayName\n/m/1,Animal\n/m/2,Cat\n/m/3,"Dog, small"\n')
    rows = ["ImageID,Source,LabelName,Confidence"]
    for i in range(43):
        rows += [f"id{i:02d},verification,/m/1,1", f"id{i:02d},verification,/m/{2 + i % 2},{int(i > 3)}"]
    rows += ["elsewhere,verification,/m/2,1", "id05,verification,/m/9,1"]
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    files = ["--labels", str(tmp_path / "labels.csv"), "--classes", str(tmp_path / "classes.csv")]
    assert prepare_open_images.main(["--root", str(tree), "--min-images", "3", *files]) == 0
    assert "43 of 43 images in 3 classes" in capsys.readouterr().out
    dataset = build("OpenImages", tree)
    assert dataset.classnames == ["Animal", "Cat", "Dog, small"]
    assert prepare_open_images.main(["--root", str(tmp_path / "none"), *files]) == 2
    assert "--images-path names another" in capsys.readouterr().err

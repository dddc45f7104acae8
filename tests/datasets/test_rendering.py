"""Outlines, glyphs, styles and the Shapes datasets."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dassl.config import get_cfg_default
from datasets import extend_cfg, shapes
from datasets.rendering import (
    COLORS,
    DIGIT_WORDS,
    LETTERS,
    OTHER_OUTLINES,
    SHAPE_CLASSES,
    TEXTURES,
    Style,
    compose,
    draw_outline,
    glyph_mask,
    outline_mask,
    random_style,
)


@pytest.mark.parametrize("name", [*SHAPE_CLASSES, *OTHER_OUTLINES])
def test_every_outline_is_inside_the_picture_and_neither_empty_nor_full(name: str) -> None:
    masks = [outline_mask(name, np.random.default_rng(seed)) for seed in range(5)]
    for mask in masks:
        assert mask.shape == (64, 64) and mask.dtype == np.float32
        assert 0.01 < mask.mean() < 0.75
        edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert edge.mean() < 0.1
    assert not np.array_equal(masks[0], masks[1])
    assert np.array_equal(masks[0], outline_mask(name, np.random.default_rng(0)))


def test_area_of_known_outlines() -> None:
    square = [("add", np.array([(-1.0, -1.0), (1, -1), (1, 1), (-1, 1)]))]
    half = draw_outline(square, 64, scale=0.5, angle=0, shift=(0, 0), stretch=1)
    assert half.mean() == pytest.approx(0.25, abs=0.02)
    hole = draw_outline([*square, ("cut", square[0][1] * 0.5)], 64, scale=0.5, angle=0, shift=(0, 0), stretch=1)
    assert hole.mean() == pytest.approx(0.25 - 0.0625, abs=0.02)
    turned = draw_outline(square, 64, scale=0.5, angle=45, shift=(0, 0), stretch=1)
    assert turned.mean() == pytest.approx(half.mean(), abs=0.02) and not np.allclose(turned, half)
    right = draw_outline(square, 64, scale=0.25, angle=0, shift=(0.5, 0), stretch=1)
    assert right[:, :32].sum() == 0 and right[:, 32:].sum() > 0


@pytest.mark.parametrize("character", [*"0123456789", *LETTERS])
def test_every_glyph_shows(character: str) -> None:
    mask = glyph_mask(character, np.random.default_rng(3))
    assert mask.shape == (64, 64) and 0.02 < mask.mean() < 0.9


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_paint_object_and_background_in_their_colors(texture: str) -> None:
    mask = np.zeros((64, 64), np.float32)
    mask[16:48, 16:48] = 1
    style = Style(color="red", background="blue", texture=texture, noise=0.0)
    picture = compose(mask, style, np.random.default_rng(0)).astype(float)
    assert picture.shape == (64, 64, 3)
    background, rim = picture[2:12].mean(axis=(0, 1)), picture[17, 20:44].mean(axis=0)
    assert np.argmax(background) == 2 and np.argmax(rim) == 0
    inside = picture[24:40, 24:40]
    assert (np.argmax(inside.mean(axis=(0, 1))) == 2) == (
        texture == "outlined"
    )  # an outline lets the background through


def test_random_styles_never_hide_the_object_in_its_background() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        style = random_style(rng, ("red", "green"), ("plain",))
        assert {style.color, style.background} == {"red", "green"} and style.texture == "plain"


def test_names_are_unique() -> None:
    names = [*SHAPE_CLASSES, *OTHER_OUTLINES, *DIGIT_WORDS]
    assert len(set(names)) == len(names) and len(SHAPE_CLASSES) == 40
    assert set(shapes.COLORS) < set(COLORS) and set(shapes.TEXTURES) < set(TEXTURES)


def _cfg(name: str, **dataset):
    cfg = get_cfg_default()
    extend_cfg(cfg)
    cfg.DATASET.NAME, cfg.SEED = name, 1
    for key, value in dataset.items():
        cfg.DATASET[key] = value
    return cfg


def test_a_class_folder_is_made_anew_alike(tmp_path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        shapes.write_images(folder, shapes.draw_plain, range(3, 4), 4, seed=1)
    files = sorted((tmp_path / "a").rglob("*.png"))
    assert [f.parent.name for f in files] == ["03_circle"] * 4
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
        assert Image.open(file).size == (64, 64)


@pytest.mark.parametrize("draw", [shapes.draw_plain, shapes.draw_v2, shapes.draw_sketch, shapes.draw_adversarial])
def test_pictures_of_a_class_differ(draw) -> None:
    rng = np.random.default_rng(0)
    first, second = draw("arrow", rng), draw("arrow", rng)
    assert first.mode == "RGB" and first.size == (64, 64) and first.tobytes() != second.tobytes()


def test_renditions_are_of_six_kinds() -> None:
    rng = np.random.default_rng(0)
    pictures = [shapes.draw_rendition("heart", rng) for _ in range(30)]
    assert {p.mode for p in pictures} == {"RGB"}
    assert any(len(p.getcolors(4096) or []) == 2 for p in pictures)  # the dithered one


def test_shifted_sets_say_which_classes_of_shapes_they_hold() -> None:
    wanted = {
        "ShapesV2": list(range(40)),
        "ShapesSketch": list(range(40)),
        "ShapesA": list(range(0, 40, 2)),
        "ShapesR": list(range(1, 40, 2)),
    }
    for name, indices in wanted.items():
        dataset = getattr(shapes, name)(_cfg(name))
        assert dataset.class_indices == indices and dataset.test_only and dataset.val is None
        assert dataset.classnames == [shapes.CLASSES[i] for i in indices]
        assert len(dataset.test) == 25 * len(indices)
    new = shapes.ShapesA(_cfg("ShapesA", SUBSAMPLE_CLASSES="new"))
    assert new.class_indices == list(range(20, 40, 2)) and new.num_classes == 10


def test_shapes_has_forty_classes_in_the_order_of_the_table() -> None:
    dataset = shapes.Shapes(_cfg("Shapes", NUM_SHOTS=2))
    assert dataset.classnames == list(SHAPE_CLASSES)
    assert dataset.val is not None and dataset.test is not None
    assert (len(dataset.train_x), len(dataset.val), len(dataset.test)) == (80, 80, 1200)
    with Image.open(dataset.test[0].impath) as image:
        assert image.size == (64, 64) and image.mode == "RGB"

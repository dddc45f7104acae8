"""Digits and Shapes with made-up names: the same images and picks, and names that say nothing."""

import hashlib
from pathlib import Path

import pytest

import datasets
from dassl.config import get_cfg_default
from dassl.data.datasets import build_dataset
from datasets.nonsense import NAMES
from trainers.clip import load_clip
from trainers.clip.alike import unknown_words


def build(name, **keys):
    cfg = get_cfg_default()
    datasets.extend_cfg(cfg)
    cfg.DATASET.NAME, cfg.SEED = name, 1
    for key, value in keys.items():
        cfg.DATASET[key] = value
    return build_dataset(cfg)


def content(item):
    return hashlib.sha256(Path(item.impath).read_bytes()).hexdigest(), item.label


@pytest.mark.parametrize("name", ["Digits", "Shapes"])
def test_images_and_picks_are_those_of_the_original(name):
    original, other = build(name, NUM_SHOTS=1), build(f"{name}Nonsense", NUM_SHOTS=1)
    for part in ("train_x", "val", "test"):
        assert [content(item) for item in getattr(other, part)] == [content(item) for item in getattr(original, part)]
    assert list(other.classnames) == list(NAMES[: len(original.classnames)])
    assert list(original.classnames) != list(other.classnames)


def test_names_differ_and_the_tiny_clip_knows_none():
    assert len(set(NAMES)) == 40
    assert unknown_words(load_clip("tiny"), NAMES) == list(NAMES)

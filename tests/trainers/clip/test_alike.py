"""Classes that CLIP cannot tell apart by their names are found, and each trainer says so before it trains."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.nn import functional as F

from datasets import digits, shapes
from trainers.clip import alike, load_clip, tell_alike, templates_for, zeroshot_weights
from trainers.clip.alike import alike_classes, unknown_words


def test_groups_are_those_of_a_naive_search(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(40, 8, generator=generator), dim=-1)
    for copy, source in ((7, 3), (20, 3), (31, 12)):
        texts[copy] = F.normalize(texts[source] + 1e-4 * torch.randn(8, generator=generator), dim=-1)
    close = {(i, j) for i in range(40) for j in range(i) if float(texts[i].double() @ texts[j].double()) >= 0.9999}
    assert close == {(7, 3), (20, 3), (20, 7), (31, 12)}
    for rows in (1, 3, 1024):
        monkeypatch.setattr(alike, "_ROWS", rows)
        assert alike_classes(texts) == [[3, 7, 20], [12, 31]]
    assert alike_classes(texts, 1.0 + 1e-5) == []
    assert alike_classes(texts, -1.0) == [list(range(40))]
    assert alike_classes(texts[:1]) == []


CLASSES = {"Digits": digits.CLASSES, "Shapes": shapes.CLASSES}


@pytest.fixture(scope="module")
def tiny():
    return load_clip("tiny")


def warnings_for(clip, names, caplog, dataset="MyOwn"):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="trainers.clip.alike"):
        tell_alike(clip, names, zeroshot_weights(clip, names, templates_for(dataset)))
    return [record.getMessage() for record in caplog.records]


def test_the_tiny_clip_names_words_that_it_does_not_know(tiny, caplog):
    names = ["dress", "red square", "hat", "Pants", "red circle", "blue_hat"]
    assert unknown_words(tiny, names) == ["dress", "hat", "Pants"]
    same, unknown = warnings_for(tiny, names, caplog)
    assert "{dress, hat, Pants}." in same and "square" not in same
    assert unknown.endswith("reads all of them as the same: dress, hat, Pants") and '"tiny"' in unknown


def test_many_are_cut_short(tiny, caplog):
    names = [f"{letter}{letter}q" for letter in "abcdefghijklmn"]
    assert len(unknown_words(tiny, names)) == 14
    assert " and 4 more words" in warnings_for(tiny, names, caplog)[-1]


@pytest.mark.parametrize("name", ["Digits", "Shapes"])
def test_names_that_it_was_trained_with_are_told_apart(name, tiny, caplog):
    assert warnings_for(tiny, list(CLASSES[name]), caplog, name) == []


def test_without_a_list_of_known_tokens_all_are_known(tiny):
    known, tiny.known_ids = tiny.known_ids, None
    try:
        assert unknown_words(tiny, ["dress"]) == []
    finally:
        tiny.known_ids = known

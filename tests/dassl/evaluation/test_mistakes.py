"""Mistakes of a split: what is listed, in which order, what a picture shows, and names that would break a file."""

import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image

from dassl.evaluation.mistakes import class_results, mistakes_of, mistakes_sheet, write_mistakes
from dassl.evaluation.predictions import Recorder
from dassl.evaluation.sheet import THUMB, TRUE_COLOR, Bar, Tile, draw_sheet
from dassl.utils import InputError

NAMES = {0: 'a "cat", or so', 1: "dog\nof two lines", 2: "bird"}


@pytest.fixture
def split(tmp_path):
    """Logits [12, 3], labels [12] and paths of a split; the images of even positions are there."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = 3 * torch.randn(12, 3, generator=generator), torch.tensor([0, 1, 2] * 4)
    paths = [str(tmp_path / f"{i}.png") for i in range(12)]
    for i in range(0, 12, 2):
        Image.new("RGB", (8 + i, 20), (20 * i, 10, 200)).save(paths[i])
    return logits, labels, paths


def recorded(logits, labels, paths):
    recorder = Recorder(len(labels), 10**6)
    recorder.tell(paths)
    recorder.add({"clip": -logits, "final": logits}, labels)
    return recorder.finish("test", "final", "clip", NAMES)


def test_each_mistake_is_listed_the_surest_first(split, tmp_path):
    logits, labels, paths = split
    expected = []
    for i in range(len(labels)):
        shares = [math.exp(value) for value in logits[i].tolist()]
        shares = [share / sum(shares) for share in shares]
        predicted, true = shares.index(max(shares)), int(labels[i])
        if predicted != true:
            expected.append((shares[predicted], i, NAMES[true], NAMES[predicted], shares[true]))
    expected.sort(reverse=True)
    found = mistakes_of(recorded(*split))
    assert 0 < len(found) < 12
    assert [(m.position, m.true, m.predicted) for m in found] == [(i, *names) for _, i, *names, _ in expected]
    assert [m.probability for m in found] == pytest.approx([row[0] for row in expected], abs=1e-6)
    assert [m.probability_of_true for m in found] == pytest.approx([row[-1] for row in expected], abs=1e-6)
    assert {m.position for m in mistakes_of(recorded(*split), "clip")} != {m.position for m in found}
    with pytest.raises(InputError, match="Expected a head out of clip, final"):
        mistakes_of(recorded(*split), "none")

    write_mistakes(tmp_path / "mistakes.csv", found)
    with open(tmp_path / "mistakes.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["path"] for row in rows] == [paths[m.position] for m in found]
    assert [row["true"] for row in rows] == [m.true for m in found]
    assert [float(row["probability"]) for row in rows] == pytest.approx([m.probability for m in found], abs=1e-6)


def test_without_paths_an_image_is_its_position(split, tmp_path):
    logits, labels, _ = split
    found = mistakes_of(recorded(logits, labels, None))
    write_mistakes(tmp_path / "mistakes.csv", found)
    assert (tmp_path / "mistakes.csv").read_text().splitlines()[1].startswith(f"#{found[0].position},")
    assert mistakes_sheet(found, 2).std() > 0


def test_classes_the_worst_first(split):
    logits, labels, _ = split
    results = class_results(recorded(*split))
    predicted = logits.argmax(1)
    for label, name in NAMES.items():
        result = next(r for r in results if r.name == name)
        others = [int(((labels == label) & (predicted == other)).sum()) for other in NAMES if other != label]
        assert (result.total, result.correct) == (4, int(((labels == label) & (predicted == label)).sum()))
        assert result.to_rival == max(others) and bool(result.rival) == (max(others) > 0)
    shares = [r.correct / r.total for r in results]
    assert shares == sorted(shares) and len(str(results[0]).splitlines()) == 1
    gone = recorded(logits[:2], labels[:2], None)  # a class without images is not there
    assert {r.name for r in class_results(gone)} == {NAMES[0], NAMES[1]}


def test_a_picture_shows_each_image_and_a_gray_square_for_what_is_gone(split):
    found = mistakes_of(recorded(*split))
    sheet = mistakes_sheet(found)
    tile = sheet.shape[1] // 3
    for number, mistake in enumerate(found):
        left, top = number % 3 * tile, number // 3 * (sheet.shape[0] // -(-len(found) // 3))
        middle = sheet[top + 8 + 15 + THUMB // 4, left + 8 + THUMB // 2]
        there = mistake.position % 2 == 0
        expected = (20 * mistake.position, 10, 200) if there else (238, 238, 238)
        assert np.allclose(middle, expected, atol=2), mistake
    assert len(mistakes_sheet(found, 1)) < len(sheet)


def test_bars_are_as_long_as_the_shares_and_long_names_stay_in_their_place():
    bars = [Bar("x" * 500, 0.25, True), Bar("日本語", 1.0, False)]
    sheet = draw_sheet([Tile(lambda: None, "title " * 100, [("head", bars), ("other", bars)])])
    row = sheet[8 + 15 + 15 + 1]  # at the upper edge of the first bars
    green = np.flatnonzero((row == TRUE_COLOR).all(-1))
    left = 8 + THUMB + 8
    assert green.min() == left and np.isin(np.arange(left, left + 46), green).mean() > 0.9
    assert not np.isin(np.arange(left + 50, left + 190), green).any() and (green > left + 190).any()

import numpy as np
import pytest
import torch

from dassl.evaluation.drawing import fitting, font
from dassl.evaluation.figures import confusion_image, examples_image
from dassl.evaluation.matrix import BAR, BLUES
from dassl.evaluation.passes import Example, spread


@pytest.mark.parametrize("classes", [1, 3, 40, 41, 1000, 1500])
def test_confusion_matrix_of_any_size(classes):
    image = confusion_image(torch.eye(classes).long(), {0: "cat"}, "test")
    assert image.dtype == np.uint8 and image.shape[2] == 3 and max(image.shape) < 1500
    rows, columns = np.nonzero((image == BLUES[-1]).all(-1))
    matrix = columns < columns.max() - BAR  # the rest is the upper end of the scale
    rows, columns = rows[matrix] - rows.min(), columns[matrix] - columns.min()
    side = rows.max() + 1
    assert (rows * classes // side == columns * classes // side).all()  # a diagonal from the upper left


def test_cells_have_the_color_of_their_share_of_the_row():
    counts = torch.tensor([[50, 50, 0], [0, 0, 0], [10**7, 0, 0]])
    image = confusion_image(counts, {0: "a", 1: "b", 2: "c"}).astype(int)
    rows, columns = np.nonzero((image == BLUES[-1]).all(-1))
    corner = columns < columns.max() - BAR  # of the darkest cell, the third of the first column
    (top, bottom), left = (rows[corner].min(), rows[corner].max()), columns[corner].min()
    side = bottom - top + 1
    for row, shares in enumerate([[0.5, 0.5, 0], [0, 0, 0], [1, 0, 0]]):
        for column, share in enumerate(shares):
            found = image[top + (row - 2) * side + 3, left + column * side + 3]
            assert (found == BLUES[round(255 * share)]).all(), (row, column)
    assert (np.diff(BLUES.astype(int).sum(1)) <= 0).all()  # from light to dark


def test_any_names_are_written_as_they_are():
    counts = torch.tensor([[1, 2], [3, 4]])
    plain = confusion_image(counts, {0: "x", 1: "y"}, "t")
    for name in ("$", r"$\frac{$", "two\nlines", "日本語", "x" * 500, ""):
        image = confusion_image(counts, {0: name, 1: "y"}, f"{name} " * 20)
        assert image.std() > 0 and image.shape[1] < plain.shape[1] + 500
    wide = confusion_image(counts, {0: "a longer name", 1: "y"}, "t")
    assert wide.shape[0] - plain.shape[0] == wide.shape[1] - plain.shape[1] > 50  # room is made on both sides


def test_examples_without_files_or_a_head_to_compare_with(tmp_path):
    logits = {"main": torch.tensor([0.1, 3.0])}
    examples = [
        Example("", torch.rand(3, 4, 4), 0, logits),
        Example(str(tmp_path / "gone.png"), None, 1, logits),
        Example("", torch.rand(7), 1, logits),  # features, not a picture
    ]
    alone = examples_image(examples, {0: "cat", 1: "dog"}, "main", "clip")
    assert alone.ndim == 3 and alone.std() > 0
    both = [Example("", None, 0, {**logits, "clip": torch.tensor([1.0, 0.0])})]
    assert examples_image(both, {}, "main", "clip").shape[1] > alone.shape[1]


@pytest.mark.parametrize(
    "total, count, expected", [(10, 4, {0, 3, 6, 9}), (3, 8, {0, 1, 2}), (5, 1, {0}), (0, 8, set())]
)
def test_spread(total, count, expected):
    assert spread(total, count) == expected


def test_a_text_is_cut_where_it_stops_fitting():
    text, measure = "Ein langer Name, WWW iii", font(17).getlength
    assert fitting(text, measure(text), 17) == text and fitting(text, 0) == "…"
    for width in range(20, int(measure(text)), 7):
        cut = fitting(text, width, 17)
        kept = len(cut) - 1
        assert cut == f"{text[:kept]}…" and measure(cut) <= width < measure(f"{text[: kept + 1]}…")

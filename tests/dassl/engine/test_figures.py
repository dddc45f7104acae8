import numpy as np
import pytest
import torch

from dassl.evaluation.figures import confusion_image, examples_image
from dassl.evaluation.passes import Example, spread


@pytest.mark.parametrize("classes", [1, 3, 100])
def test_confusion_matrix_of_any_size(classes):
    image = confusion_image(torch.eye(classes).long(), {0: "cat"}, "test")
    assert image.dtype == np.uint8 and image.shape[2] == 3 and image.std() > 0


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

"""Metrics against scikit-learn and a calibration error written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, top_k_accuracy_score

from dassl.evaluation import HeadMetrics, heads_table, macro_f1


def naive_ece(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    total = 0.0
    for low in np.linspace(0, 1, bins + 1)[:-1]:
        inside = (confidence > low) & (confidence <= low + 1 / bins)
        if inside.any():
            total += inside.mean() * abs((predicted == labels)[inside].mean() - confidence[inside].mean())
    return 100 * total


@pytest.mark.parametrize("classes", [3, 7])
def test_agrees_with_independent_computations(classes):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(50, classes, generator=generator)
    labels = torch.randint(classes - 1, (50,), generator=generator)  # the last class does not occur
    metrics = HeadMetrics(classes)
    for part in range(0, 50, 16):
        metrics.update(logits[part : part + 16], labels[part : part + 16])
    values = metrics.compute()
    true, predicted, probabilities = labels.numpy(), logits.argmax(1).numpy(), logits.softmax(1).numpy()
    assert list(values) == ["accuracy", "top5", "macro_f1", "ece"]
    assert values["accuracy"] == pytest.approx(100 * accuracy_score(true, predicted), abs=1e-12)
    if classes > 5:
        top5 = 100 * top_k_accuracy_score(true, probabilities, k=5, labels=range(classes))
        assert values["top5"] == pytest.approx(top5, abs=1e-12)
    else:
        assert values["top5"] == 100.0
    f1 = 100 * f1_score(true, predicted, average="macro", labels=np.unique(true))
    assert values["macro_f1"] == pytest.approx(f1, abs=1e-12)
    assert values["ece"] == pytest.approx(naive_ece(probabilities, true), abs=1e-4)
    assert metrics.confusion().tolist() == confusion_matrix(true, predicted, labels=range(classes)).tolist()


def test_half_precision_logits_and_masked_classes():
    metrics = HeadMetrics(3)
    metrics.update(torch.tensor([[9.0, -torch.inf, 1.0], [1.0, -torch.inf, 2.0]]).half(), torch.tensor([0, 0]))
    assert metrics.compute()["accuracy"] == 50.0


def test_one_class():
    metrics = HeadMetrics(1)
    metrics.update(torch.tensor([[3.0], [-1.0]]), torch.tensor([0, 0]))
    assert metrics.compute() == {"accuracy": 100.0, "top5": 100.0, "macro_f1": 100.0, "ece": 0.0}
    assert metrics.confusion().tolist() == [[2]]


@pytest.mark.parametrize(
    "logits, labels, error, message",
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, r"labels in 0\.\.2, .* but got 0\.\.3"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), ValueError, r"but got -1\.\.0"),
        (torch.zeros(2, 3), torch.tensor([0]), ValueError, r"shapes \(2, 3\) and \(1,\)"),
        (torch.zeros(2), torch.tensor([0, 0]), ValueError, r"shapes \(2,\)"),
        (torch.full((1, 3), torch.nan), torch.tensor([0]), FloatingPointError, "without NaN"),
    ],
)
def test_refuses_what_it_cannot_count(logits, labels, error, message):
    with pytest.raises(error, match=message):
        HeadMetrics(3).update(logits, labels)


def test_macro_f1_of_a_class_never_predicted():
    assert macro_f1(torch.tensor([[2, 0, 0], [1, 0, 1], [0, 0, 0]])) == pytest.approx(100 * (0.8 + 0.0) / 2)


def test_table_marks_the_main_head_and_no_line_looks_like_a_result():
    values = {"accuracy": 100.0, "top5": 99.5, "macro_f1": 12.345, "ece": 0.0}
    lines = heads_table({"clip": values, "final": values}, main="final").splitlines()
    assert lines[2].split() == ["clip", "100.00", "99.50", "12.35", "0.00"]
    assert lines[3].split() == ["final", "(main)", "100.00", "99.50", "12.35", "0.00"]
    assert not any("*" in line for line in lines)

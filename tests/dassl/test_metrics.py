"""Accuracy and distances against plain loops."""

from __future__ import annotations

import pytest
import torch

from dassl.metrics import compute_accuracy, compute_distance_matrix, cosine_distance, euclidean_squared_distance


def test_accuracy_against_a_loop():
    torch.manual_seed(0)
    scores, labels = torch.randn(20, 7), torch.randint(7, (20,))
    for k, result in zip((1, 3, 7), compute_accuracy(scores, labels, topk=(1, 3, 7)), strict=True):
        order = [sorted(range(7), key=lambda c, row=row: -row[c])[:k] for row in scores.tolist()]
        hits = sum(label in best for label, best in zip(labels.tolist(), order, strict=True))
        assert result.shape == (1,)
        assert result.item() == pytest.approx(100 * hits / 20)


def test_accuracy_takes_the_first_of_several_outputs():
    scores, labels = torch.eye(3), torch.tensor([0, 1, 0])
    assert compute_accuracy((scores, None), labels)[0].item() == pytest.approx(200 / 3)


def test_accuracy_refuses():
    with pytest.raises(ValueError, match="topk"):
        compute_accuracy(torch.eye(3), torch.zeros(3), topk=(5,))
    with pytest.raises(ValueError, match="Expected scores"):
        compute_accuracy(torch.eye(3), torch.zeros(2))


def test_distances_against_loops():
    torch.manual_seed(0)
    a, b = torch.randn(4, 5, dtype=torch.double), torch.randn(3, 5, dtype=torch.double)
    euclid = torch.tensor([[((x - y) ** 2).sum() for y in b] for x in a])
    cosine = torch.tensor([[1 - (x @ y) / (x.norm() * y.norm()) for y in b] for x in a])
    torch.testing.assert_close(euclidean_squared_distance(a, b), euclid)
    torch.testing.assert_close(cosine_distance(a, b), cosine)
    torch.testing.assert_close(compute_distance_matrix(a, b), euclid)
    torch.testing.assert_close(compute_distance_matrix(a, b, metric="cosine"), cosine)
    assert (euclidean_squared_distance(a, a) >= 0).all()


def test_distances_refuse():
    with pytest.raises(ValueError, match="manhattan"):
        compute_distance_matrix(torch.eye(2), torch.eye(2), metric="manhattan")
    with pytest.raises(ValueError, match=r"\[M, D\]"):
        compute_distance_matrix(torch.eye(2), torch.eye(3))

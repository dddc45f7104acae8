import math

import pytest
import torch

from trainers.dlrclip.skd import mean_abs_difference, skd_loss, smoothed_teacher


def naive_skd(student, teacher, temperature, a):
    """The published formula with plain numbers."""
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        es, et = [math.exp(x / temperature) for x in s], [math.exp(x / temperature) for x in t]
        for x, y in zip(es, et, strict=True):
            q, p = x / sum(es), (1 - a) * y / sum(et) + a / len(et)
            total += p * (math.log(p) - math.log(q))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize(("temperature", "smoothing"), [(2.0, 0.2), (1.0, 0.5), (4.0, 0.01)])
def test_formula(temperature, smoothing):
    torch.manual_seed(0)
    student, teacher = 5 * torch.randn(4, 6), 5 * torch.randn(4, 6)
    got = skd_loss(student, teacher, temperature=temperature, smoothing=smoothing)
    assert got.item() == pytest.approx(naive_skd(student, teacher, temperature, smoothing), rel=1e-5)


def test_defaults_are_the_published_ones():
    student, teacher = torch.randn(2, 3), torch.randn(2, 3)
    assert skd_loss(student, teacher).item() == pytest.approx(naive_skd(student, teacher, 2.0, 0.2), rel=1e-5)


def test_zero_without_smoothing_where_student_equals_teacher():
    logits = torch.randn(3, 4)
    assert skd_loss(logits, logits, smoothing=0.0).item() == pytest.approx(0.0, abs=1e-6)
    assert skd_loss(logits, logits, smoothing=0.2).item() > 0


def test_teacher_takes_no_gradient():
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    skd_loss(student, teacher).backward()
    mean_abs_difference(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_smoothed_teacher_is_a_distribution():
    p = smoothed_teacher(100 * torch.randn(3, 5), 2.0, 0.2)
    torch.testing.assert_close(p.sum(dim=1), torch.ones(3))
    assert p.min().item() >= 0.2 / 5 - 1e-6


def test_mean_abs_difference():
    assert mean_abs_difference(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 1.0]])).item() == 2.0

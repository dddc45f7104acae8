import math

import pytest
import torch
from scipy.optimize import minimize

from trainers.linear_probe import COARSE, ProbeLearner, binary_search, fit_logistic


def data(num_classes, n=40):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % num_classes
    centres = torch.randn(num_classes, 6, generator=generator)
    return torch.randn(n, 6, generator=generator) + centres[labels], labels


@pytest.mark.parametrize("num_classes", [2, 3])
def test_fit_is_the_minimum_of_the_penalized_cross_entropy(num_classes):
    x, y = data(num_classes)
    weight, bias = fit_logistic(x, y, num_classes, c=0.5)

    def objective(flat):
        w, b = flat[: num_classes * 6].view(num_classes, 6), flat[num_classes * 6 :]
        loss = torch.nn.functional.cross_entropy(x.double() @ w.t() + b, y, reduction="sum")
        return 0.5 * loss + 0.5 * (w**2).sum()

    def value_and_gradient(numbers):
        flat = torch.tensor(numbers, requires_grad=True)
        value = objective(flat)
        value.backward()
        return value.item(), flat.grad.numpy()

    best = minimize(value_and_gradient, torch.zeros(num_classes * 7).double().numpy(), jac=True, tol=1e-12)
    w = torch.tensor(best.x[: num_classes * 6]).view(num_classes, 6)
    if num_classes == 2:  # scikit-learn penalizes the one difference of rows: another minimum, the same form
        assert torch.equal(weight[0], torch.zeros(6)) and bias[0] == 0
        assert ((x @ weight.t() + bias).argmax(1) == y).float().mean() > 0.8
    else:
        torch.testing.assert_close(weight.double(), w - w.mean(0) + weight.double().mean(0), rtol=1e-2, atol=1e-3)


def test_each_class_counts_the_same_where_asked_for():
    x, y = data(3, 36)
    rows = torch.cat([torch.nonzero(y == label)[:count, 0] for label, count in enumerate((12, 6, 3))])
    repeated = torch.cat([rows[:12], rows[12:18].repeat(2), rows[18:].repeat(4)])  # 12 of each
    # Of 21 images an average one counts 1, and of 36 repeated ones, too: the penalty has to grow as their number.
    got = fit_logistic(x[rows], y[rows], 3, c=0.5 * 36 / 21, balanced=True)
    want = fit_logistic(x[repeated], y[repeated], 3, c=0.5)
    torch.testing.assert_close(got.weight, want.weight, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(got.weight, fit_logistic(x[rows], y[rows], 3, c=0.5 * 36 / 21).weight, atol=1e-2)


def test_a_class_without_images():
    x, y = data(3)
    with pytest.raises(ValueError, match="none of \\[3\\]"):
        fit_logistic(x, y, 4, c=1.0)


def naive_search(score):
    """As CoOp's comparison: in logarithms, step by step."""
    accs = [score(c) for c in (1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6)]
    peak = (1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6)[max(range(7), key=lambda i: accs[i])]
    left, right = math.log10(peak) - 1, math.log10(peak) + 1
    for _ in range(8):
        a, b = score(10**left), score(10**right)
        chosen = right if a < b else left
        middle = (left + right) / 2
        left, right = (middle, right) if a < b else (left, middle)
    return 10**chosen


@pytest.mark.parametrize("best", [3e-3, 0.7, 40.0, 2e5])
def test_binary_search(best):
    def score(c):
        return -abs(math.log10(c) - math.log10(best))

    assert binary_search(score) == pytest.approx(naive_search(score), rel=1e-6)
    assert abs(math.log10(binary_search(score) / best)) < 1.0
    assert 1.0 in COARSE


def test_text_probe_starts_as_zero_shot(make_clip, names):
    zeroshot = torch.nn.functional.normalize(torch.randn(5, 24), dim=1)
    learner = ProbeLearner(make_clip(), names, zeroshot, trained=True)
    features = torch.nn.functional.normalize(torch.randn(3, 24), dim=1)
    torch.testing.assert_close(learner(features), 100 * features @ zeroshot.t(), rtol=1e-4, atol=2e-3)
    assert [name for name, _ in learner.named_parameters()] == ["weight"]

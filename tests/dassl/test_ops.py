"""Small operations, schedules and policies that upstream has, beside plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from torch import nn

from dassl.data.transforms.autoaugment import CIFAR10Policy, ImageNetPolicy, SVHNPolicy
from dassl.modeling import ops
from dassl.optim.lr_scheduler import ConstantWarmupScheduler, LinearWarmupScheduler
from dassl.optim.radam import RAdam
from dassl.utils.torchtools import adjust_learning_rate, set_bn_to_eval


def test_probabilities_and_labels():
    p = torch.tensor([[0.2, 0.8], [0.5, 0.5]])
    torch.testing.assert_close(
        ops.sharpen_prob(p, 2), torch.tensor([[0.04, 0.64], [0.25, 0.25]]) / p.pow(2).sum(1, True)
    )
    assert ops.create_onehot(torch.tensor([1, 0]), 3).tolist() == [[0, 1, 0], [1, 0, 0]]
    data, label = torch.arange(5.0), torch.arange(5)
    assert [x.tolist() for x in ops.reverse_index(data, label)] == [[4, 3, 2, 1, 0]] * 2
    shuffled = ops.shuffle_index(data, label)
    assert shuffled[0].tolist() == shuffled[1].tolist() and sorted(shuffled[1].tolist()) == list(range(5))


def test_ramps():
    assert [ops.linear_rampup(t, 10) for t in (-1, 5, 20)] == [0, 0.5, 1]
    assert ops.sigmoid_rampup(5, 10) == pytest.approx(math.exp(-5 * 0.25)) and ops.sigmoid_rampup(99, 10) == 1
    with pytest.raises(ValueError, match="above 0"):
        ops.linear_rampup(1, 0)


def test_average_of_models():
    model, average = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = 0.9 * average.weight.detach() + 0.1 * model.weight.detach()
    ops.ema_model_update(model, average, 0.9)
    torch.testing.assert_close(average.weight.detach(), expected)


@pytest.mark.parametrize("keep", [False, True])
def test_mixup(keep):
    torch.manual_seed(0)
    x, y = torch.rand(2, 4, 3, 2, 2), torch.eye(3)[torch.randint(3, (2, 4))]
    mixed, labels = ops.mixup(x[0], x[1], y[0], y[1], 0.5, preserve_order=keep)
    for i in range(4):
        share = ((mixed[i] - x[1, i]) / (x[0, i] - x[1, i])).mean()
        torch.testing.assert_close(labels[i], share * y[0, i] + (1 - share) * y[1, i], rtol=0, atol=1e-4)
        assert 0 <= share <= 1 + 1e-5 and (not keep or share >= 0.5 - 1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_with_smoothed_labels(reduction):
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    target = 0.8 * torch.eye(3)[labels] + 0.2 / 3
    each = -(target * logits.log_softmax(1)).sum(1)
    expected = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
    torch.testing.assert_close(ops.cross_entropy(logits, labels, 0.2, reduction), expected)


def test_gradients_turned_round():
    x = torch.ones(3, requires_grad=True)
    (2 * ops.ReverseGrad()(x, 0.5)).sum().backward()
    assert x.grad.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("kind", ["constant", "linear"])
def test_warm_up_around_another_schedule(kind):
    optim = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    successor = torch.optim.lr_scheduler.StepLR(optim, 2, gamma=0.5)
    make = {"constant": ConstantWarmupScheduler, "linear": LinearWarmupScheduler}[kind]
    sched = make(optim, successor, 2, 0.1, verbose=False)
    rates = []
    for _ in range(8):
        rates.append(optim.param_groups[0]["lr"])
        optim.step()
        sched.step()
    start = {"constant": [0.1, 0.1], "linear": [0.1, 0.5]}[kind]
    assert rates == pytest.approx([*start, 1, 1, 0.5, 0.5, 0.25, 0.25])


def test_rates_by_hand_and_batch_norm():
    optim = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    adjust_learning_rate(optim, 1.0, 45, stepsize=20, gamma=0.1)
    assert optim.param_groups[0]["lr"] == pytest.approx(0.01)
    adjust_learning_rate(optim, 1.0, 25, linear_decay=True, final_lr=0.2, max_epoch=100)
    assert optim.param_groups[0]["lr"] == pytest.approx(0.8)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()).train()
    model.apply(set_bn_to_eval)
    assert not model[0].training and model[1].training


def test_radam_decays_weights_directly():
    weight = nn.Parameter(torch.ones(1))
    optim = RAdam([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros(1)
    optim.step()
    assert weight.item() == pytest.approx(1 - 0.1 * 0.5)


@pytest.mark.parametrize("policy", [ImageNetPolicy, CIFAR10Policy, SVHNPolicy])
def test_policies_give_images(policy):
    image = policy()(Image.new("RGB", (16, 12), "red"))
    assert isinstance(image, Image.Image) and image.size == (16, 12)

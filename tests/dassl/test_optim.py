"""Optimizers and schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dassl.config import get_cfg_default
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import InputError


def options(**values):
    node = get_cfg_default().OPTIM
    for key, value in values.items():
        node[key] = value
    return node


def rates(node, count, start=None, **kwargs):
    """Rates of ``count`` successive positions, the first group's."""
    optimizer = build_optimizer(nn.Linear(1, 1), node)
    scheduler = build_lr_scheduler(optimizer, node, **kwargs)
    if start is not None:
        scheduler.load_state_dict(start)
    output = []
    for _ in range(count):
        output.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return output, scheduler


# optimizers


@pytest.mark.parametrize(
    "name, kind, expected",
    [
        ("adam", torch.optim.Adam, {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}),
        ("amsgrad", torch.optim.Adam, {"amsgrad": True}),
        ("adamw", torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "dampening": 0, "nesterov": False}),
        ("rmsprop", torch.optim.RMSprop, {"momentum": 0.9, "alpha": 0.99}),
        ("radam", torch.optim.RAdam, {"decoupled_weight_decay": True}),
    ],
)
def test_every_optimizer(name, kind, expected):
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(model, options(NAME=name, LR=0.01))
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.01 and group["weight_decay"] == 5e-4
    assert len(group["params"]) == 2  # frozen ones included
    for key, value in expected.items():
        assert group[key] == value
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.clone()
    optimizer.step()
    assert not torch.equal(before, model.weight)


def test_adam_eps_is_optional():
    node = options(ADAM_EPS=1e-4)
    assert build_optimizer(nn.Linear(1, 1), node).param_groups[0]["eps"] == 1e-4
    del node["ADAM_EPS"]  # a node written for upstream
    assert build_optimizer(nn.Linear(1, 1), node).param_groups[0]["eps"] == 1e-8


def test_iterables_and_groups(caplog):
    model = nn.Linear(1, 1)
    assert len(build_optimizer(model.parameters(), options()).param_groups[0]["params"]) == 2
    assert len(build_optimizer([{"params": [model.weight]}], options()).param_groups[0]["params"]) == 1
    groups = [{"params": [model.weight], "lr": 1.0}, {"params": [model.bias]}]
    optimizer = build_optimizer(model, options(STAGED_LR=True), param_groups=groups)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.0003]
    assert "ignored" in caplog.text


def test_staged():
    model = nn.Sequential()
    model.add_module("body", nn.Linear(2, 2))
    model.add_module("head", nn.Linear(2, 1))
    optimizer = build_optimizer(model, options(STAGED_LR=True, NEW_LAYERS=("head",), LR=0.1, BASE_LR_MULT=0.5))
    base, new = optimizer.param_groups
    assert (base["lr"], new["lr"]) == (0.05, 0.1)
    assert base["params"] == list(model.body.parameters()) and new["params"] == list(model.head.parameters())
    with pytest.raises(InputError, match='did you mean "head"'):
        build_optimizer(model, options(STAGED_LR=True, NEW_LAYERS="heads"))
    with pytest.raises(InputError, match="module"):
        build_optimizer(model.parameters(), options(STAGED_LR=True))


def test_staged_without_new_layers_warns(caplog):
    optimizer = build_optimizer(nn.Sequential(nn.Linear(1, 1)), options(STAGED_LR=True, LR=1.0))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]
    assert "NEW_LAYERS is empty" in caplog.text


def test_wrong_optimizer():
    with pytest.raises(InputError, match='did you mean "adamw"'):
        build_optimizer(nn.Linear(1, 1), options(NAME="adam_w"))
    with pytest.raises(InputError, match="got none"):
        build_optimizer([], options())


# schedules


COSINE = {"NAME": "sgd", "LR": 0.002, "LR_SCHEDULER": "cosine", "MAX_EPOCH": 10}


@pytest.mark.parametrize(
    "values, expected",
    [
        # Observed with upstream's classes.
        (
            {"WARMUP_EPOCH": 1, "WARMUP_TYPE": "constant"},
            [1e-5, 2e-3, 1.9511e-3, 1.8090e-3, 1.5878e-3, 1.3090e-3, 1e-3, 6.9098e-4, 4.1221e-4, 1.9098e-4],
        ),
        ({"WARMUP_EPOCH": 3}, [1e-5, 6.6667e-4, 1.3333e-3, 2e-3, 1.9511e-3]),
        ({"WARMUP_EPOCH": 3, "WARMUP_RECOUNT": False}, [1e-5, 6.6667e-4, 1.3333e-3, 2e-3, 1.6489e-3, 1.2596e-3]),
        ({"WARMUP_EPOCH": 0}, [2e-3 * (1 + math.cos(math.pi * e / 10)) / 2 for e in range(11)]),
    ],
)
def test_cosine_and_warmup(values, expected):
    assert rates(options(**COSINE, **values), len(expected))[0] == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_cosine_ends_at_zero_and_stays():
    found, _ = rates(options(**COSINE), 13)
    assert found[10:] == pytest.approx([0.0, 0.0, 0.0])


def test_continued_cosine_reaches_zero():
    found, _ = rates(options(**COSINE, WARMUP_EPOCH=3, WARMUP_RECOUNT=False), 11)
    assert found[3] == pytest.approx(0.002) and found[10] == pytest.approx(0.0)


@pytest.mark.parametrize(
    "values, reference",
    [
        (
            {"LR_SCHEDULER": "single_step", "STEPSIZE": (2, 3)},
            lambda o: torch.optim.lr_scheduler.StepLR(o, 3, gamma=0.1),
        ),
        (
            {"LR_SCHEDULER": "single_step", "STEPSIZE": (-1,)},
            lambda o: torch.optim.lr_scheduler.StepLR(o, 10, gamma=0.1),
        ),
        (
            {"LR_SCHEDULER": "multi_step", "STEPSIZE": (2, 5, 5)},
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5, 5], gamma=0.1),
        ),
        ({"LR_SCHEDULER": "cosine"}, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10)),
    ],
)
def test_against_torchs_schedules(values, reference):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = reference(optimizer)
    expected = []
    for _ in range(11):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(options(NAME="sgd", LR=0.1, **values), 11)[0] == pytest.approx(expected, abs=1e-12)


def test_groups_keep_their_ratio_and_warm_up_alike():
    node = options(**COSINE, WARMUP_EPOCH=1, WARMUP_TYPE="constant")
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [weights[0]], "lr": 0.1}, {"params": [weights[1]], "lr": 0.2}]
    optimizer = build_optimizer(weights, node, param_groups=groups)
    scheduler = build_lr_scheduler(optimizer, node)
    assert scheduler.get_last_lr() == [1e-5, 1e-5]
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("cut", [1, 2, 6])
def test_resuming_goes_on_as_if_uninterrupted(tmp_path, cut):
    node = options(**COSINE, WARMUP_EPOCH=3)
    whole, _ = rates(node, 10)
    model = nn.Linear(1, 1)
    optimizer = build_optimizer(model, node)
    scheduler = build_lr_scheduler(optimizer, node)
    for _ in range(cut):
        optimizer.step()
        scheduler.step()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path / "a.pth")
    state = torch.load(tmp_path / "a.pth", weights_only=True)  # plain values only

    optimizer = build_optimizer(model, node)
    scheduler = build_lr_scheduler(optimizer, node)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    found = []
    for _ in range(cut, 10):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found == whole[cut:]


def test_resuming_with_more_epochs_follows_the_longer_curve():
    _, scheduler = rates(options(**COSINE), 5)
    longer = options(**{**COSINE, "MAX_EPOCH": 20})
    assert rates(longer, 3, start=scheduler.state_dict())[0] == rates(longer, 8)[0][5:]


def test_a_state_of_torchs_own_scheduler_can_be_taken_up():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.002)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    found, _ = rates(options(**COSINE), 1, start=scheduler.state_dict())
    assert found == pytest.approx(scheduler.get_last_lr())


def test_steps_as_the_unit():
    node = options(**COSINE, LR_UNIT="step", WARMUP_EPOCH=2)
    found, _ = rates(node, 53, steps_per_epoch=5)  # its calls of scheduler.step change nothing
    assert found[:3] == pytest.approx([1e-5, 1e-3, 2e-3])  # two steps of warm-up
    assert found[2 + 25] == pytest.approx(1e-3) and found[2 + 50] == pytest.approx(0.0)
    assert rates(options(**COSINE), 11, steps_per_epoch=5)[0] == rates(options(**COSINE), 11)[0]


def test_steps_as_the_unit_under_a_loop_that_updates_per_epoch():
    node = options(**COSINE, LR_UNIT="step")
    optimizer = build_optimizer(nn.Linear(1, 1), node)
    scheduler = build_lr_scheduler(optimizer, node)
    with pytest.raises(RuntimeError, match="set_steps_per_epoch"):
        optimizer.step()
    scheduler.set_steps_per_epoch(4)
    found = []
    for _ in range(10):
        for _ in range(4):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
        scheduler.step()
    assert found == pytest.approx([0.001 * (1 + math.cos(math.pi * t / 40)) for t in range(40)])
    assert scheduler.state_dict()["last_epoch"] == 40

    resumed = build_optimizer(nn.Linear(1, 1), node)
    again = build_lr_scheduler(resumed, node)
    again.load_state_dict({"last_epoch": 7})
    again.set_steps_per_epoch(4)  # the loop starts after the checkpoint is loaded
    assert resumed.param_groups[0]["lr"] == found[7]
    with pytest.raises(ValueError, match="at least one step"):
        again.set_steps_per_epoch(0)


@pytest.mark.parametrize(
    "values, told",
    [
        ({"LR_SCHEDULER": "cosin"}, "cosine"),
        ({"WARMUP_EPOCH": 1, "WARMUP_TYPE": "quick"}, "quick"),
        ({"LR_UNIT": "batch"}, "batch"),
        ({"MAX_EPOCH": 0}, "MAX_EPOCH"),
        ({"LR_SCHEDULER": "multi_step", "STEPSIZE": (-1,)}, "STEPSIZE"),
        ({"LR_SCHEDULER": "single_step", "STEPSIZE": (0.5,)}, "STEPSIZE"),
    ],
)
def test_wrong_schedules(values, told):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(InputError, match=told):
        build_lr_scheduler(optimizer, options(**values))

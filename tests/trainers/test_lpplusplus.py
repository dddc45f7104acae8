"""LP++ beside the formulas of its docstring, written out with autograd and torch's own SGD."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from feature_world import CLASSES, WIDTH, unit, world
from torch.nn import functional as F

import trainers
from trainers import lpplusplus
from trainers.app import prediction
from trainers.features.encoder import FeatureSet
from trainers.lpplusplus import (
    LPPlusPlusLearner,
    Probe,
    descend,
    loss_and_gradient,
    probe_logits,
    start_probe,
    step_sizes,
)


def naive_start(rows, labels, zeroshot):
    """Return w and alpha, image by image."""
    weight, own = np.zeros((CLASSES, WIDTH)), [[] for _ in range(CLASSES)]
    for row, y in zip(rows.numpy(), labels.tolist(), strict=True):
        weight[y] += row
        own[y].append(row @ zeroshot[y].numpy())
    return weight, 250 * np.mean([np.mean(cosines) for cosines in own])


def naive_steps(rows, zeroshot):
    n = len(rows)
    largest = np.linalg.norm(rows.numpy(), 2) ** 2  # the largest singular value of F, squared
    sums = [sum((row @ t) ** 2 for row in rows.numpy()) for t in zeroshot.numpy()]
    return 4 * n / largest, n / (4 * max(sums))


def naive_descent(rows, labels, zeroshot, epochs, reset):
    """Return w, b and alpha after as many epochs."""
    weight, alpha = naive_start(rows, labels, zeroshot)
    step, alpha_step = naive_steps(rows, zeroshot)
    model = torch.nn.Linear(WIDTH, CLASSES).double()
    model.weight.data, model.bias.data = torch.tensor(weight), torch.zeros(CLASSES, dtype=torch.float64)
    alpha = torch.full((CLASSES,), alpha, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), step, momentum=0.9)
    for epoch in range(1, epochs + 1):
        optimizer.zero_grad()
        if reset:
            alpha.grad = None
        F.cross_entropy(model(rows) + alpha * (rows @ zeroshot.t()), labels).backward()
        optimizer.step()
        if epoch % 10 == 0:
            alpha.data -= alpha_step * alpha.grad
    return model.weight.detach(), model.bias.detach(), alpha.detach()


def close(got, want, tolerance=1e-9):
    torch.testing.assert_close(got, torch.as_tensor(want).to(got), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("counts", [[1] * CLASSES, [2, 3, 4, 1, 5]])
def test_start_and_steps(counts):
    values, labels = world(1, counts)
    zeroshot = unit(CLASSES, WIDTH, seed=9)
    weight, alpha = naive_start(values[0], labels, zeroshot)
    probe = start_probe(values, labels, zeroshot)
    close(probe.weight, weight)
    close(probe.alpha, np.full(CLASSES, alpha))
    assert not probe.bias.any()
    assert step_sizes(values[0], zeroshot) == pytest.approx(naive_steps(values[0], zeroshot))


def test_views_count_as_rows_but_not_as_more_images():
    values, labels = world(3, [2, 3, 4, 1, 5])
    zeroshot = unit(CLASSES, WIDTH, seed=9)
    weight, alpha = naive_start(values.flatten(0, 1), labels.repeat(3), zeroshot)
    probe = start_probe(values, labels, zeroshot)
    close(probe.weight, weight / 3)
    close(probe.alpha, np.full(CLASSES, alpha))


@pytest.mark.parametrize("at_once", [1, 7, 2**26])
def test_loss_and_gradient(at_once, monkeypatch):
    monkeypatch.setattr(lpplusplus, "NUMBERS_AT_ONCE", at_once * CLASSES)
    values, labels = world(1, [2, 3, 4, 1, 5])
    zeroshot = unit(CLASSES, WIDTH, seed=9)
    probe = Probe(unit(CLASSES, WIDTH, seed=4), unit(CLASSES, seed=5), 3 + unit(CLASSES, seed=6))
    for value in probe:
        value.requires_grad_(True)
    want = F.cross_entropy(probe_logits(probe, values[0], zeroshot), labels)
    want.backward()
    with torch.no_grad():
        loss, gradient = loss_and_gradient(probe, values[0], labels, zeroshot)
    close(loss, want.detach())
    for got, value in zip(gradient, probe, strict=True):
        close(got, value.grad)


@pytest.mark.parametrize("at_once", [7, 2**26])
@pytest.mark.parametrize("reset", [True, False])
def test_descent(reset, at_once, monkeypatch):
    """Products with the texts are kept over the epochs where they are computed at once."""
    monkeypatch.setattr(lpplusplus, "NUMBERS_AT_ONCE", at_once * CLASSES)
    values, labels = world(1, [2, 3, 4, 1, 5])
    zeroshot = unit(CLASSES, WIDTH, seed=9)
    start = start_probe(values, labels, zeroshot)
    steps = step_sizes(values[0], zeroshot)
    probe = descend(start, steps, values[0], labels, zeroshot, epochs=34, reset=reset)
    for got, want in zip(probe, naive_descent(values[0], labels, zeroshot, 34, reset), strict=True):
        close(got, want, 1e-8)
    again = start_probe(values, labels, zeroshot)
    assert all(torch.equal(a, b) for a, b in zip(start, again, strict=True))  # the start is not changed
    early = descend(start, steps, values[0], labels, zeroshot, epochs=9, reset=reset)
    assert torch.equal(early.alpha, start.alpha)  # its first step is in the tenth epoch


def test_a_class_without_images_is_named():
    with pytest.raises(ValueError, match=r"training images of all 5 classes but got none of \[1, 4\]"):
        start_probe(unit(2, 3, WIDTH), torch.tensor([0, 2, 3]), unit(CLASSES, WIDTH))


def test_logits_and_part_of_the_classes(make_clip, names):
    f, w = unit(6, WIDTH, seed=8).float(), unit(CLASSES, WIDTH, seed=9).float()
    learner = LPPlusPlusLearner(make_clip(), names, w)
    close(learner(f), learner.clip_logits(f), 1e-4)  # before the fit
    parts = {"weight": unit(CLASSES, WIDTH, seed=1), "bias": unit(CLASSES, seed=2), "alpha": 50 * unit(CLASSES, seed=3)}
    for name, value in parts.items():
        getattr(learner, name).copy_(value)
    want = [
        [float(x @ parts["weight"][k] + parts["bias"][k] + parts["alpha"][k] * (x @ w[k].double())) for k in range(5)]
        for x in f.double()
    ]
    close(learner(f), want, 1e-4)
    chosen = [3, 0]
    part = LPPlusPlusLearner(make_clip(), [names[i] for i in chosen], w[chosen])
    part.take({name: value.clone() for name, value in learner.state_dict().items()})
    close(part(f), learner(f)[:, chosen], 1e-5)
    with pytest.raises(ValueError, match="Expected classes that were trained on"):
        LPPlusPlusLearner(make_clip(), ["lamp", names[0]], w[:2]).take(learner.state_dict())


@pytest.fixture
def make_cfg(small_run):
    return small_run("lpplusplus")


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("views", [1, 2])
def test_a_run_chooses_nothing_and_is_the_descent(validation, views, make, tmp_path):
    trainer = make("LPPlusPlus", "TRAINER.LPPLUSPLUS.EPOCHS", 20, "TRAINER.LPPLUSPLUS.VIEWS", views)
    if not validation:
        trainer.dm.dataset._val = None
        trainer.val_loader = None
    trainer.train()
    learner, known = trainer.network.learner, trainer.train_features.all()
    assert known.values.shape[:2] == (views, 20)
    rows, labels = known.flat()
    start, steps = start_probe(known.values, known.labels, learner.zeroshot), step_sizes(rows, learner.zeroshot)
    want = descend(start, steps, rows, labels, learner.zeroshot, epochs=20, reset=True)
    assert all(torch.equal(getattr(learner, name), value) for name, value in want._asdict().items())
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["selected"] == trainer.selected == {}
    assert metrics["params"]["trainable"] == 10 * (32 + 2)
    summary = trainer.fit(FeatureSet(known.values, known.labels, ()))
    assert summary["loss"] == pytest.approx(float(F.cross_entropy(learner(rows), labels)), rel=1e-4)


def test_a_run_classifies_part_of_its_classes_later(make, tmp_path):
    trainer = make("LPPlusPlus", "TRAINER.LPPLUSPLUS.EPOCHS", 20)
    trainer.train()
    args = SimpleNamespace(
        model_dir=str(tmp_path / "run"), load_epoch=None, classes="three,one", cpu=True, debug=False, set=[],
        batch_size=None,
    )  # fmt: skip
    loaded, found = prediction.load_trainer(args)
    assert found == ["three", "one"]
    for name in LPPlusPlusLearner.CLASS_ROWS:
        assert torch.equal(getattr(loaded.network.learner, name), getattr(trainer.network.learner, name)[[3, 1]])


@pytest.mark.parametrize(("key", "value"), [("VIEWS", -1), ("EPOCHS", 0), ("RESET", 1)])
def test_bad_settings_are_named(key, value, make_cfg):
    cfg = make_cfg("LPPlusPlus").clone()
    cfg.defrost()
    cfg.TRAINER.LPPLUSPLUS[key] = value
    with pytest.raises(ValueError, match=f"Expected TRAINER.LPPLUSPLUS.{key} to be "):
        trainers.lpplusplus.LPPlusPlus.check_settings(cfg)

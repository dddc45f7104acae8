"""ProKeR beside the formulas of its docstring, written out with numpy, image by image."""

import json
import logging
import math
from types import SimpleNamespace

import feature_world
import numpy as np
import pytest
import torch
from feature_world import CLASSES, WIDTH, unit
from torch.nn import functional as F

from dassl.data.datasets import DATASET_REGISTRY
from trainers import proker
from trainers.app import prediction
from trainers.proker import (
    FIXED,
    GRID,
    GRIDS,
    LandmarkRidge,
    ProKeRLearner,
    Ridge,
    fixed_values,
    kernel,
    pick_landmarks,
)

GRIDS_SEARCHED = ("TRAINER.PROKER.BETA_GRID", (0.5, 3.0, 4), "TRAINER.PROKER.LAMBDA_GRID", (0.001, 1, 3))


def world(views, counts):
    """Features [V, N, E] and labels [N] of images, and zero-shot weights [C, E]."""
    return *feature_world.world(views, counts), unit(len(counts), WIDTH, seed=4)


def naive_kernel(x, y, beta):
    return np.array([[math.exp(-beta * (1 - a @ b)) for b in y] for a in x])


def naive(features, rows, labels, zeroshot, beta, lambda_):
    """Return the logits of the source, without the temperature, for rows that are images of these labels."""
    residual = -rows @ zeroshot.T
    for i, y in enumerate(labels):
        residual[i, y] += 1
    system = naive_kernel(rows, rows, beta) / lambda_ + np.eye(len(rows))
    return features @ zeroshot.T + naive_kernel(features, rows, beta) @ np.linalg.inv(system) @ residual


def residual_of(values, labels, zeroshot):
    return F.one_hot(labels.repeat(len(values)), len(zeroshot)) - values.flatten(0, 1) @ zeroshot.t()


def close(got, want, tolerance=1e-9):
    torch.testing.assert_close(got, torch.as_tensor(want).to(got), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("views", "counts"), [(1, [1] * CLASSES), (3, [2, 3, 4, 1, 5])])
@pytest.mark.parametrize(("beta", "lambda_"), [(0.5, 0.01), (2.6, 1.0)])
def test_logits(views, counts, beta, lambda_):
    values, labels, zeroshot = world(views, counts)
    rows, f = values.flatten(0, 1), unit(7, WIDTH, seed=8)
    want = naive(f.numpy(), rows.numpy(), labels.repeat(views).tolist(), zeroshot.numpy(), beta, lambda_)
    found = Ridge(rows, residual_of(values, labels, zeroshot), beta).coefficients(lambda_)
    close(f @ zeroshot.t() + kernel(f, rows, beta) @ found, want)


@pytest.mark.parametrize(("views", "counts"), [(1, [2, 3, 4, 1, 5]), (3, [2, 3, 4, 1, 5]), (4, [1] * CLASSES)])
@pytest.mark.parametrize(("beta", "lambda_"), [(0.5, 0.01), (2.6, 1.0)])
def test_leaving_out_is_the_fit_to_the_other_images(views, counts, beta, lambda_):
    """With all its views, also where its class is then empty."""
    values, labels, zeroshot = world(views, counts)
    got = Ridge(values.flatten(0, 1), residual_of(values, labels, zeroshot), beta).left_out(lambda_, views)
    for i in range(len(labels)):
        kept = torch.arange(len(labels)) != i
        rows, of = values[:, kept].flatten(0, 1).numpy(), labels[kept].repeat(views).tolist()
        f = values[:, i].numpy()
        want = naive(f, rows, of, zeroshot.numpy(), beta, lambda_) - f @ zeroshot.numpy().T
        close(got[i], want, 1e-8)


@pytest.mark.parametrize("at_once", [1, 2**26])
def test_landmarks(at_once, monkeypatch):
    """All rows as landmarks are the exact regression; fewer are least squares in what they span."""
    monkeypatch.setattr(proker, "NUMBERS_AT_ONCE", at_once)
    values, labels, zeroshot = world(2, [2, 3, 4, 1, 5])
    rows, f = values.flatten(0, 1), unit(7, WIDTH, seed=8)
    residual = residual_of(values, labels, zeroshot)
    exact = kernel(f, rows, 1.5) @ Ridge(rows, residual, 1.5).coefficients(0.1)
    close(kernel(f, rows, 1.5) @ LandmarkRidge(rows, residual, 1.5, rows).coefficients(0.1), exact, 1e-6)
    some = rows[:11]
    across, among = naive_kernel(some, rows, 1.5), naive_kernel(some, some, 1.5)
    want = 0.1 * np.linalg.solve(across @ across.T + 0.1 * among, across @ residual.numpy())
    got = LandmarkRidge(rows, residual, 1.5, some).coefficients(0.1)
    close(kernel(f, some, 1.5) @ got, naive_kernel(f, some, 1.5) @ want, 1e-6)


def test_landmarks_are_of_all_images_before_any_is_there_twice(monkeypatch):
    monkeypatch.setattr(proker, "LANDMARKS", 6)
    assert pick_landmarks(12, 4, seed=1).tolist()[:4] == [0, 1, 2, 3]
    assert len(set(pick_landmarks(12, 4, seed=1).tolist())) == 6
    few = pick_landmarks(30, 10, seed=1)
    assert len(few) == 6 and few.max() < 10
    assert torch.equal(few, pick_landmarks(30, 10, seed=1)) and not torch.equal(few, pick_landmarks(30, 10, seed=2))


def test_values_of_the_source():
    assert set(GRIDS) <= set(DATASET_REGISTRY.registered_names())
    assert [len(axis.values()) for axis in GRID] == [20, 10]
    assert [fixed_values(n) for n in (1, 2, 4, 8, 16)] == list(FIXED.values())
    assert fixed_values(0.5) == FIXED[1] and fixed_values(3) == FIXED[4] and fixed_values(200) == FIXED[16]
    assert [axis.values() for axis in GRIDS["StanfordCars"]] == [
        pytest.approx([0.1, 2.575, 5.05, 7.525, 10]),
        pytest.approx([0.01, 0.2575, 0.505, 0.7525, 1]),
    ]


def test_part_of_the_classes(make_clip, names):
    """A class has its column of A, and is compared with the images of all classes."""
    values, labels, zeroshot = world(2, [2, 3, 4, 1, 5])
    rows, f = values.flatten(0, 1), unit(6, WIDTH, seed=8)
    learner = ProKeRLearner(make_clip(), names, zeroshot, len(rows))
    close(learner(f.float()), learner.clip_logits(f.float()))  # before the fit
    learner.support.copy_(rows)
    learner.coefficients.copy_(Ridge(rows, residual_of(values, labels, zeroshot), 2.0).coefficients(0.1).t())
    learner.beta.fill_(2.0)
    want = 100 * naive(f.numpy(), rows.numpy(), labels.repeat(2).tolist(), zeroshot.numpy(), 2.0, 0.1)
    close(learner(f.float()), want, 1e-3)
    chosen = [3, 0]
    part = ProKeRLearner(make_clip(), [names[i] for i in chosen], zeroshot[chosen], 1)
    part.take({name: value.clone() for name, value in learner.state_dict().items()})
    assert part.support.shape == rows.shape
    close(part(f.float()), want[:, chosen], 1e-3)
    with pytest.raises(ValueError, match="Expected classes that were trained on"):
        ProKeRLearner(make_clip(), ["lamp", names[0]], zeroshot[:2], 1).take(learner.state_dict())
    broken = {**learner.state_dict(), "support": rows[1:].float()}
    with pytest.raises(ValueError, match="Expected coefficients to have shape"):
        ProKeRLearner(make_clip(), names, zeroshot, 1).take(broken)


@pytest.fixture
def make_cfg(small_run):
    return small_run("proker", "TRAINER.PROKER.VIEWS", 2, *GRIDS_SEARCHED)


def naive_of(trainer, features, beta, lambda_):
    """Return the logits of a trained run for features [B, E], without the temperature."""
    rows, labels = trainer.train_features.all().flat()
    zeroshot = trainer.network.learner.zeroshot
    arrays = [value.double().numpy() for value in (features, rows, zeroshot)]
    return torch.as_tensor(naive(arrays[0], arrays[1], labels.tolist(), arrays[2], beta, lambda_))


POINTS = [(beta, lambda_) for beta in (0.5, 0.5 + 2.5 / 3, 0.5 + 5 / 3, 3.0) for lambda_ in (0.001, 0.5005, 1.0)]


def selected(beta, lambda_, on, n):
    return {name: {"value": value, "on": on, "n": n} for name, value in (("beta", beta), ("lambda", lambda_))}


def test_the_first_of_the_best_points_on_validation_images_is_taken(make):
    trainer = make("ProKeR")
    trainer.train()
    known, learner = trainer.val_loader.all(), trainer.network.learner
    hits = [int((naive_of(trainer, known.values[0], *p).argmax(1) == known.labels).sum()) for p in POINTS]
    beta, lambda_ = POINTS[hits.index(max(hits))]
    found = {name: choice["value"] for name, choice in trainer.selected.items()}
    assert found == pytest.approx({"beta": beta, "lambda": lambda_})
    assert trainer.selected == selected(*found.values(), "val", len(known))
    f = known.values[0]
    close(learner(f), float(learner.scale) * naive_of(trainer, f, beta, lambda_), 2e-3)
    assert trainer.fitted_parameters == learner.coefficients.numel() == 10 * 40


def without_validation(trainer):
    trainer.dm.dataset._val = None
    trainer.val_loader = None
    trainer.train()
    return trainer


def test_without_validation_images_each_training_image_is_left_out(make):
    trainer = without_validation(make("ProKeR", "DATASET.NUM_SHOTS", 3))
    known, zeroshot = trainer.train_features.all(), trainer.network.learner.zeroshot.double().numpy()
    hits = []
    for beta, lambda_ in POINTS:
        hits.append(0)
        for i, y in enumerate(known.labels.tolist()):
            kept = torch.arange(30) != i
            rows, of = known.values[:, kept].flatten(0, 1).double().numpy(), known.labels[kept].repeat(2).tolist()
            logits = naive(known.values[:, i].double().numpy(), rows, of, zeroshot, beta, lambda_)
            hits[-1] += int((logits.argmax(axis=1) == y).sum())
    best = [point for point, count in zip(POINTS, hits, strict=True) if count == max(hits)]
    found = {name: choice["value"] for name, choice in trainer.selected.items()}
    assert tuple(found.values()) == pytest.approx(best[0])
    on = "training images, each left out once (no validation set)"
    assert trainer.selected == selected(*found.values(), on, 30)


@pytest.mark.parametrize("shots", [1, 2])
def test_with_few_images_of_each_class_the_source_s_values_are_taken(shots, make, tmp_path):
    trainer = without_validation(make("ProKeR", "DATASET.NUM_SHOTS", shots))
    reason = "(no validation set, too few images of each class to leave out one)"
    assert trainer.selected == selected(*FIXED[shots], f"TRAINER.PROKER.BETA, .LAMBDA {reason}", 0)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["selected"] == trainer.selected


def test_given_values(make):
    pairs = ("TRAINER.PROKER.SEARCH", False, "TRAINER.PROKER.BETA", 1.25)
    trainer = make("ProKeR", *pairs)
    trainer.train()
    on = "TRAINER.PROKER.BETA, .LAMBDA (TRAINER.PROKER.SEARCH is False)"
    assert trainer.selected == selected(1.25, 0.05, on, 0)
    f = trainer.val_loader.all().values[0]
    close(trainer.network.learner(f), trainer.network.learner.scale * naive_of(trainer, f, 1.25, 0.05), 2e-3)


def test_many_rows_have_landmarks(make, monkeypatch, caplog):
    monkeypatch.setattr(proker, "MOST_ROWS", 39)
    monkeypatch.setattr(proker, "LANDMARKS", 30)
    trainer = make("ProKeR")
    with caplog.at_level(logging.INFO):
        trainer.train()
    assert "40 rows are more than 39: 30 of them are landmarks" in caplog.text
    learner = trainer.network.learner
    assert learner.support.shape == (30, 32) and trainer.selected["beta"]["on"] == "val"
    assert trainer.fitted_parameters == learner.coefficients.numel() == 300
    alone = without_validation(make("ProKeR", out="alone"))
    assert alone.selected["beta"]["on"].endswith("(no validation set, too many rows to leave out images)")


def test_a_run_classifies_part_of_its_classes_later(make, tmp_path):
    trainer = make("ProKeR")
    trainer.train()
    args = SimpleNamespace(
        model_dir=str(tmp_path / "run"), load_epoch=None, classes="three,one", cpu=True, debug=False, set=[],
        batch_size=None,
    )  # fmt: skip
    loaded, found = prediction.load_trainer(args)
    assert found == ["three", "one"]
    other, learner = loaded.network.learner, trainer.network.learner
    assert torch.equal(other.coefficients, learner.coefficients[[3, 1]])
    assert torch.equal(other.support, learner.support) and float(other.beta) == float(learner.beta)
    assert loaded.selected == trainer.selected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("VIEWS", -1),
        ("SEARCH", 1),
        ("BETA", -0.5),
        ("LAMBDA", math.inf),
        ("BETA_GRID", (0.5, 3.0)),
        ("LAMBDA_GRID", (0.0, 1.0, 3)),
        ("LAMBDA_GRID", (0.5, 0.1, 3)),
        ("BETA_GRID", (0.5, 3.0, 2.5)),
    ],
)
def test_bad_settings_are_named(key, value, make_cfg):
    cfg = make_cfg("ProKeR").clone()
    cfg.defrost()
    cfg.TRAINER.PROKER[key] = value
    with pytest.raises(ValueError, match=f"Expected TRAINER.PROKER.{key} to be "):
        proker.ProKeR.check_settings(cfg)

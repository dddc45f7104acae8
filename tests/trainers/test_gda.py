"""GDA beside the formulas of its docstring, written out with numpy, image by image."""

import functools
import json
import math
from types import SimpleNamespace

import feature_world
import numpy as np
import pytest
import torch
from feature_world import CLASSES, WIDTH

from trainers import gda
from trainers.app import predict, prediction
from trainers.features.encoder import FeatureSet
from trainers.gda import (
    ALPHAS,
    GDALearner,
    describe_new,
    fit_gaussians,
    left_out_likelihood,
    left_out_logits,
    linear,
    precision_matrix,
)

unit = functools.partial(feature_world.unit, dtype=torch.float32)
world = functools.partial(feature_world.world, dtype=torch.float32)


def naive_inverse(scatter, n):
    covariance = scatter / (n - 1)
    return len(scatter) * np.linalg.pinv((n - 1) * covariance + np.trace(covariance) * np.eye(len(scatter)))


def naive_fit(values, labels, num_classes):
    """Return the means and P of rows, all views one below the other."""
    rows, of = values.double().flatten(0, 1).numpy(), np.tile(labels.numpy(), len(values))
    means = np.array([np.mean([row for row, y in zip(rows, of, strict=True) if y == c], 0) for c in range(num_classes)])
    scatter = np.zeros((rows.shape[1], rows.shape[1]))
    for row, y in zip(rows, of, strict=True):
        scatter += np.outer(row - means[y], row - means[y])
    return means, naive_inverse(scatter, len(rows))


def naive_logits(features, means, inverse):
    c = len(means)
    return np.array([[f @ inverse @ m + math.log(1 / c) - m @ inverse @ m / 2 for m in means] for f in features])


def same(got, want, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(got, torch.as_tensor(want).to(got), rtol=rtol, atol=atol)


def fill(learner, values, labels, alpha):
    learner.fit(FeatureSet(values, labels, ()))
    learner.alpha.fill_(alpha)
    return learner


@pytest.mark.parametrize(("views", "counts"), [(1, [2, 3, 4, 2, 5]), (3, [1, 1, 1, 1, 1]), (10, [3, 1, 2, 3, 3])])
def test_means_covariance_and_logits(views, counts, make_clip, names):
    values, labels = world(views, counts)
    means, inverse = naive_fit(values, labels, CLASSES)
    found = fit_gaussians(values, labels, CLASSES)
    same(found.means, means)
    same(precision_matrix(found.scatter, values[..., 0].numel()), inverse)
    f, w = unit(7, WIDTH, seed=8), unit(CLASSES, WIDTH, seed=9)
    learner = GDALearner(make_clip(), names, w, n=views * len(labels), alpha=0.1)
    fill(learner, values, labels, 0.7)
    want = 100 * f.numpy() @ w.numpy().T + 0.7 * naive_logits(f.double().numpy(), means, inverse)
    same(learner(f), want, rtol=1e-4, atol=2e-3)
    assert [name for name, _ in learner.named_parameters()] == []


def test_without_any_spread_all_directions_count_alike():
    values = unit(1, CLASSES, WIDTH).expand(4, -1, -1)
    found = fit_gaussians(values, torch.arange(CLASSES), CLASSES)
    assert torch.equal(precision_matrix(found.scatter, 4 * CLASSES), torch.eye(WIDTH, dtype=torch.float64))


def test_a_class_without_images_is_named(make_clip, names):
    learner = GDALearner(make_clip(), names, unit(CLASSES, WIDTH), n=6, alpha=0.1)
    with pytest.raises(ValueError, match=r"training images of all 5 classes but got none of \[1, 4\]"):
        learner.fit(FeatureSet(unit(2, 3, WIDTH), torch.tensor([0, 2, 3]), ()))


def without(values, labels, i):
    kept = torch.arange(len(labels)) != i
    return values[:, kept], labels[kept]


@pytest.mark.parametrize(("views", "counts"), [(1, [2, 3, 4, 2, 5]), (3, [2, 2, 2, 2, 2]), (10, [3, 1, 2, 3, 1])])
@pytest.mark.parametrize("at_once", [1, 2**22])
def test_leaving_out_is_the_fit_to_the_other_images(views, counts, at_once, monkeypatch):
    """With all its views, and not at all where it is the only image of its class."""
    monkeypatch.setattr(gda, "AT_ONCE", at_once)
    values, labels = world(views, counts)
    w = unit(CLASSES, WIDTH, seed=9)
    fitted = fit_gaussians(values, labels, CLASSES)
    spread, axes = torch.linalg.eigh(fitted.scatter)
    turned = fitted._replace(means=fitted.means @ axes)
    total, images = np.zeros(len(ALPHAS)), 0
    for i, y in enumerate(labels.tolist()):
        if counts[y] == 1:
            continue
        rows = values[:, i].double()
        want = naive_logits(rows.numpy(), *naive_fit(*without(values, labels, i), CLASSES)) + math.log(CLASSES)
        got, known = left_out_logits((rows @ axes)[None], labels[i : i + 1], turned, spread)
        assert bool(known)
        same(got[0], want, rtol=1e-9, atol=1e-9)
        for a, alpha in enumerate(ALPHAS):
            logits = 100 * rows.numpy() @ w.double().numpy().T + alpha * want
            logits -= logits.max(axis=1, keepdims=True)
            total[a] += np.mean(logits[:, y] - np.log(np.exp(logits).sum(axis=1)))
        images += 1
    likelihood, n = left_out_likelihood(values, labels, w, 100.0, ALPHAS)
    assert n == images
    same(likelihood, total / images, rtol=1e-9, atol=1e-9)


def test_an_image_whose_absence_leaves_no_spread_is_not_left_out():
    values, labels = world(1, [2, 1, 1, 1, 1])
    assert left_out_likelihood(values, labels, unit(CLASSES, WIDTH), 100.0, ALPHAS)[1] == 0
    assert left_out_likelihood(*world(3, [1] * CLASSES), unit(CLASSES, WIDTH), 100.0, ALPHAS)[1] == 0
    assert left_out_likelihood(*world(3, [2, 1, 1, 1, 1]), unit(CLASSES, WIDTH), 100.0, ALPHAS)[1] == 2


def naive_new(texts, rows):
    k = min(64, len(rows))
    means, inverses = [], []
    for t in texts:
        near = rows[np.argsort(-(rows @ t))[:k]]
        means.append(np.concatenate([near, np.repeat(t[None], 16, 0)]).mean(0))
        scatter = sum(np.outer(row - t, row - t) for row in near)
        inverses.append(naive_inverse(scatter, k))
    return np.array(means), np.mean(inverses, axis=0)


@pytest.mark.parametrize("images", [3, 40])  # 30 views in all, and more than 64
@pytest.mark.parametrize("at_once", [2, 64])
def test_new_classes(images, at_once, monkeypatch):
    monkeypatch.setattr(gda, "NEW_AT_ONCE", at_once)
    rows, texts = world(10, [images])[0].flatten(0, 1), unit(CLASSES, WIDTH, seed=4)
    want_means, want = naive_new(texts.double().numpy(), rows.double().numpy())
    means, inverse = describe_new(texts, rows)
    same(means, want_means)
    same(inverse, want)


def saved(learner):
    return {name: value.clone() for name, value in learner.state_dict().items()}


def test_other_class_lists(make_clip, names):
    """Part of the classes: their own Gaussians, the common P. Any new class: all are around their texts."""
    values, labels = world(3, [3, 1, 2, 3, 3])
    w = unit(CLASSES, WIDTH, seed=9)
    n = 3 * len(labels)
    state = saved(fill(GDALearner(make_clip(), names, w, n=n, alpha=0.1), values, labels, 0.01))
    means, inverse = naive_fit(values, labels, CLASSES)
    f = unit(6, WIDTH, seed=8)
    chosen = [3, 0]
    part = GDALearner(make_clip(), [names[i] for i in chosen], w[chosen], n=0, alpha=0.1)
    part.take(state)
    own = naive_logits(f.double().numpy(), means[chosen], inverse)
    same(part(f), 100 * f.numpy() @ w[chosen].numpy().T + 0.01 * own, rtol=1e-4, atol=1e-3)
    assert part.view_labels.bincount().tolist() == [9, 9]
    texts = unit(3, WIDTH, seed=5)
    around = naive_new(texts.double().numpy(), values.flatten(0, 1).double().numpy())
    want = 100 * f.numpy() @ texts.numpy().T + 0.01 * naive_logits(f.double().numpy(), *around)
    for classes in (["lamp", "door", "cup"], ["lamp", names[2], "cup"]):
        new = GDALearner(make_clip(), classes, texts, n=7, alpha=0.1)
        new.take(state)
        same(new(f), want, rtol=1e-4, atol=1e-3)
        assert torch.equal(new.views, values.flatten(0, 1))  # all of them, whatever is asked for
    with pytest.raises(ValueError, match="features of training images but it has none"):
        empty = {**state, "views": state["views"][:0], "view_labels": state["view_labels"][:0]}
        GDALearner(make_clip(), ["lamp"], texts[:1], n=0, alpha=0.1).take(empty)


@pytest.fixture
def make_cfg(small_run):
    return small_run("gda", "TRAINER.GDA.VIEWS", 2)


def test_alpha_is_the_least_of_the_best_on_validation_images(make):
    trainer = make("GDA")
    trainer.train()
    learner, known = trainer.network.learner, trainer.val_loader.all()
    views, labels = trainer.train_features.all().flat()
    assert torch.equal(learner.views, views) and torch.equal(learner.view_labels, labels)
    means, inverse = naive_fit(views[None], labels, 10)
    f = known.values[0]
    zeroshot = learner.scale * f.double() @ learner.zeroshot.double().t()
    gaussians = torch.as_tensor(naive_logits(f.double().numpy(), means, inverse))
    hits = [int(((zeroshot + a * gaussians).argmax(1) == known.labels).sum()) for a in ALPHAS]
    assert trainer.selected == {"alpha": {"value": ALPHAS[hits.index(max(hits))], "on": "val", "n": len(known)}}
    linear_part = linear(torch.as_tensor(means), torch.as_tensor(inverse))
    same(learner.weight, linear_part[0], rtol=1e-4, atol=1e-3)
    learner.bias.zero_()
    learner.weight.zero_()  # the Gaussians then say nothing: all values are equally good
    trainer.choose()
    assert trainer.selected["alpha"]["value"] == ALPHAS[0]


def without_validation(trainer):
    trainer.dm.dataset._val = None
    trainer.val_loader = None
    trainer.train()
    return trainer


def test_without_validation_images_it_is_chosen_by_leaving_out(make, tmp_path):
    trainer = without_validation(make("GDA"))
    known = trainer.train_features.all()
    learner = trainer.network.learner
    likelihood, n = left_out_likelihood(known.values, known.labels, learner.zeroshot, learner.scale, ALPHAS)
    best = max(range(len(ALPHAS)), key=lambda i: float(likelihood[i]))
    on = "training images, each left out once (no validation set)"
    assert trainer.selected == {"alpha": {"value": ALPHAS[best], "on": on, "n": 20}} and n == 20
    assert float(learner.alpha) == ALPHAS[best]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["selected"] == trainer.selected


def test_with_one_image_of_each_class_nothing_can_be_left_out(make):
    trainer = without_validation(make("GDA", "DATASET.NUM_SHOTS", 1, "TRAINER.GDA.ALPHA", 0.3))
    on = "TRAINER.GDA.ALPHA (no validation set, no training image can be left out)"
    assert trainer.selected == {"alpha": {"value": 0.3, "on": on, "n": 0}}
    assert float(trainer.network.learner.alpha) == 0.3


def test_a_run_classifies_trained_and_new_classes_later(make, tmp_path):
    trainer = make("GDA")
    trainer.train()
    learner = trainer.network.learner
    paths = [item.impath for item in trainer.dm.dataset.test[:4]]
    for classes in ("three,one", "three,horse"):
        args = SimpleNamespace(
            model_dir=str(tmp_path / "run"), load_epoch=None, classes=classes, cpu=True, debug=False, set=[],
            batch_size=None,
        )  # fmt: skip
        loaded, names = prediction.load_trainer(args)
        assert names == classes.split(",")
        other = loaded.network.learner
        if classes == "three,one":
            assert torch.equal(other.weight, learner.weight[[3, 1]])
        else:
            weight, bias = linear(*describe_new(other.zeroshot, learner.views))
            same(other.weight, weight, rtol=1e-5, atol=1e-5)
            same(other.bias, bias, rtol=1e-5, atol=1e-5)
        assert float(other.alpha) == float(learner.alpha) and loaded.selected == trainer.selected
        predictions, unreadable, _ = predict.predict(prediction.Model(loaded, names), [(path, path) for path in paths])
        assert len(predictions) == 4 and not unreadable


@pytest.mark.parametrize(("key", "value"), [("VIEWS", -1), ("ALPHA", -0.5), ("ALPHA", math.inf)])
def test_bad_settings_are_named(key, value, make):
    with pytest.raises(ValueError, match=f"Expected TRAINER.GDA.{key} to be a"):
        make("GDA", f"TRAINER.GDA.{key}", value)

"""TIMO beside the formulas of its docstring, written out with numpy, text by text."""

import functools
import json
import math
from types import SimpleNamespace

import feature_world
import numpy as np
import pytest
import torch
from feature_world import CLASSES, WIDTH

from datasets.digits import CLASSES as DIGITS
from trainers import timo
from trainers.app import prediction
from trainers.features.encoder import FeatureSet
from trainers.timo import ALPHAS, TIMOLearner, agreement, best_texts, fit_joined, weighed_texts

unit = functools.partial(feature_world.unit, dtype=torch.float32)
world = functools.partial(feature_world.world, dtype=torch.float32)
COUNTS = [2, 1, 3, 2, 1]  # texts of each class


def texts_of(seed=4):
    """Texts [M, E] in the order of no class, and their labels [M]."""
    labels = torch.repeat_interleave(torch.arange(CLASSES), torch.tensor(COUNTS))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    return unit(len(labels), WIDTH, seed=seed), labels


def normal(x):
    return x / np.linalg.norm(x)


def naive_agreement(texts, of, values, labels):
    images = [normal(views.mean(0)) for views in values.double().numpy().transpose(1, 0, 2)]
    means = [
        normal(np.mean([x for x, y in zip(images, labels.tolist(), strict=True) if y == c], 0)) for c in range(CLASSES)
    ]
    return np.array([t @ means[y] for t, y in zip(texts.double().numpy(), of.tolist(), strict=True)])


def naive_texts(texts, of, scores, sharpness):
    out = []
    for c in range(CLASSES):
        rows, own = texts.double().numpy()[of.numpy() == c], scores[of.numpy() == c]
        weights = np.exp(sharpness * own / np.linalg.norm(own))
        out.append(normal((weights / weights.sum()) @ rows))
    return np.array(out)


def naive_fit(rows, of):
    means = np.array([rows[of == c].mean(0) for c in range(CLASSES)])
    scatter = sum(np.outer(x - means[y], x - means[y]) for x, y in zip(rows, of, strict=True))
    inverse = len(scatter) * np.linalg.inv(scatter + np.trace(scatter) / (len(rows) - 1) * np.eye(len(scatter)))
    return means @ inverse, np.array([-m @ inverse @ m / 2 for m in means])


def same(got, want, atol=1e-6):  # views are averaged in fp32
    torch.testing.assert_close(got, torch.as_tensor(np.asarray(want)).to(got), rtol=1e-5, atol=atol)


@pytest.mark.parametrize(("views", "counts"), [(1, [2, 3, 4, 2, 5]), (3, [1, 1, 1, 1, 1])])
@pytest.mark.parametrize("sharpness", [0.0, 50.0, 5000.0])
def test_agreement_texts_and_gaussians(views, counts, sharpness):
    values, labels = world(views, counts)
    texts, of = texts_of()
    features = FeatureSet(values, labels, ())
    scores = agreement(texts, of, features, CLASSES)
    want = naive_agreement(texts, of, values, labels)
    same(scores, want)
    if sharpness < 100:
        same(weighed_texts(texts, of, scores, CLASSES, sharpness), naive_texts(texts, of, want, sharpness))
    else:  # the best text alone
        best = torch.stack(
            [texts[max((of == c).nonzero().flatten().tolist(), key=lambda i: want[i])] for c in range(5)]
        )
        same(weighed_texts(texts, of, scores, CLASSES, sharpness), best.double(), atol=1e-3)
    rows = np.concatenate([values.double().flatten(0, 1).numpy(), want[:, None] * texts.double().numpy()])
    weight, bias = naive_fit(rows, np.concatenate([np.tile(labels.numpy(), views), of.numpy()]))
    found = fit_joined(features, scores[:, None] * texts, of, CLASSES)
    same(found[0], weight)
    same(found[1], bias)


def test_the_lengths_of_views_count_in_the_mean_of_an_image():
    values, labels = world(3, [2] * CLASSES)
    lengths = torch.rand(3, len(labels), 1) + 0.5
    texts, of = texts_of()
    want = naive_agreement(texts, of, values * lengths, labels)
    same(agreement(texts, of, FeatureSet(values, labels, (), lengths), CLASSES), want, atol=1e-6)


def test_best_texts_of_each_class_in_two_rounds():
    of, scores = torch.tensor([1, 0, 1, 0, 0]), torch.tensor([0.1, 0.5, 0.9, 0.7, 0.6])
    assert best_texts(of, scores, 0).tolist() == [0, 1, 2, 3, 4]
    assert best_texts(of, scores, 1).tolist() == [3, 2]
    assert best_texts(of, scores, 2).tolist() == [3, 4, 2, 0]
    assert best_texts(of, scores, 5).tolist() == [3, 4, 1, 3, 4, 2, 0, 2, 0]  # class 1 has two texts: four at most


def test_a_class_without_images_is_named():
    values, labels = unit(2, 3, WIDTH), torch.tensor([0, 2, 3])
    with pytest.raises(ValueError, match=r"training images of all 5 classes but got none of \[1, 4\]"):
        agreement(*texts_of(), FeatureSet(values, labels, ()), CLASSES)


def test_logits_and_a_part_of_the_classes(make_clip, names):
    f = unit(6, WIDTH, seed=8)
    learner = TIMOLearner(make_clip(), names, unit(CLASSES, WIDTH), alpha=3.0)
    for i, name in enumerate(("texts", "weight")):
        getattr(learner, name).copy_(unit(CLASSES, WIDTH, seed=20 + i))
    learner.bias.copy_(torch.arange(5.0))
    for chosen in (list(range(CLASSES)), [3, 0]):
        part = TIMOLearner(make_clip(), [names[i] for i in chosen], unit(CLASSES, WIDTH)[chosen], alpha=0.0)
        part.take({name: value.clone() for name, value in learner.state_dict().items()})
        t, w, b = learner.texts[chosen], learner.weight[chosen], learner.bias[chosen]
        want = [[3 * x @ t[k] + x @ w[k] + b[k] - math.log(len(chosen)) for k in range(len(chosen))] for x in f]
        same(part(f), torch.tensor(want), atol=1e-5)
    with pytest.raises(ValueError, match="Expected classes that were trained on"):
        TIMOLearner(make_clip(), ["lamp"], unit(1, WIDTH), alpha=0.0).take(learner.state_dict())


@pytest.fixture
def make_cfg(small_run):
    return small_run("timo", "TRAINER.TIMO.VIEWS", 2)


def test_alpha_is_the_least_of_the_best_on_validation_images(make):
    trainer = make("TIMO")
    trainer.train()
    learner, known = trainer.network.learner, trainer.val_loader.all()
    assert trainer.texts.shape[0] == 80  # the dataset's prompt and seven, of ten classes
    f = known.values[0]
    hits = []
    for alpha in ALPHAS:
        logits = alpha * f @ learner.texts.t() + f @ learner.weight.t() + learner.bias
        hits.append(int((logits.argmax(1) == known.labels).sum()))
    assert trainer.selected == {"alpha": {"value": ALPHAS[hits.index(max(hits))], "on": "val", "n": len(known)}}
    learner.weight.zero_()
    learner.bias.zero_()  # the Gaussians then say nothing: all values are equally good
    trainer.choose()
    assert trainer.selected["alpha"]["value"] == ALPHAS[0]


def test_the_search_of_timo_s(make, monkeypatch):
    """Sharpness by the texts alone, then the number of texts and alpha: the first of the best, each."""
    monkeypatch.setattr(timo, "AMOUNTS", 3)
    trainer = make("TIMO", "TRAINER.TIMO.SEARCH", True)
    trainer.train()
    features, known = trainer.train_features.all(), trainer.val_loader.all()
    f, y = known.values[0], known.labels
    scores = agreement(trainer.texts, trainer.text_labels, features, 10)
    best, sharpness = -1, None
    for g in range(5, 101, 5):
        hits = int(
            ((f.double() @ weighed_texts(trainer.texts, trainer.text_labels, scores, 10, g).t()).argmax(1) == y).sum()
        )
        best, sharpness = (hits, g) if hits > best else (best, sharpness)
    own = weighed_texts(trainer.texts, trainer.text_labels, scores, 10, sharpness).float()
    best, choice = -1, None
    for amount in (1, 8, 16):
        rows = best_texts(trainer.text_labels, scores, amount)
        fitted = fit_joined(features, scores[rows, None] * trainer.texts[rows], trainer.text_labels[rows], 10)
        weight, bias = (part.float() for part in fitted)
        for alpha in ALPHAS:
            hits = int(((alpha * f @ own.t() + f @ weight.t() + bias).argmax(1) == y).sum())
            best, choice = (hits, (alpha, amount, weight)) if hits > best else (best, choice)
    assert {name: one["value"] for name, one in trainer.selected.items()} == {
        "alpha": choice[0], "sharpness": sharpness, "texts": choice[1]
    }  # fmt: skip
    torch.testing.assert_close(trainer.network.learner.weight, choice[2])
    torch.testing.assert_close(trainer.network.learner.texts, own)


@pytest.mark.parametrize("search", [False, True])
def test_without_validation_images_the_settings_stay(search, make):
    trainer = make("TIMO", "TRAINER.TIMO.SEARCH", search, "TRAINER.TIMO.ALPHA", 7.0)
    trainer.dm.dataset._val = None
    trainer.val_loader = None
    trainer.train()
    assert trainer.selected == {"alpha": {"value": 7.0, "on": "TRAINER.TIMO.ALPHA (no validation set)", "n": 0}}
    assert float(trainer.network.learner.alpha) == 7.0


def test_one_text_of_each_class_is_said_and_taken_as_it_is(make, caplog):
    trainer = make("TIMO", "TRAINER.TIMO.TEXTS", "dataset")
    assert "each class has one here" in caplog.text
    trainer.train()
    torch.testing.assert_close(trainer.network.learner.texts, trainer.network.learner.zeroshot)


def test_texts_are_the_sentences_where_there_are_such(make, tmp_path, caplog):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({name: ["red", "a circle", name][: 1 + i % 3] for i, name in enumerate(DIGITS)}))
    trainer = make("TIMO", "DATASET.DESCRIPTIONS", str(path))
    assert trainer.text_labels.bincount().tolist() == [1 + i % 3 for i in range(10)]
    assert "each class has one here" not in caplog.text


def test_a_run_classifies_a_part_of_its_classes_later(make, tmp_path):
    trainer = make("TIMO")
    trainer.train()
    args = SimpleNamespace(
        model_dir=str(tmp_path / "run"), load_epoch=None, classes="three,one", cpu=True, debug=False, set=[],
        batch_size=None,
    )  # fmt: skip
    loaded, names = prediction.load_trainer(args)
    assert names == ["three", "one"] and loaded.selected == trainer.selected
    for name in ("texts", "weight", "bias"):
        assert torch.equal(getattr(loaded.network.learner, name), getattr(trainer.network.learner, name)[[3, 1]])


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("SHARPNESS", -1.0, "a number"),
        ("ALPHA", math.inf, "a number"),
        ("TEXTS", "some", "one of dataset, select, all"),
    ],
)
def test_bad_settings_are_named(key, value, wanted, make):
    with pytest.raises(ValueError, match=f"Expected TRAINER.TIMO.{key} to be {wanted}"):
        make("TIMO", f"TRAINER.TIMO.{key}", value)

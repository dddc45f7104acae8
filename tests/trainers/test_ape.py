"""APE and APE-T beside the formulas of their docstring, written out with loops."""

import functools
import math
from types import SimpleNamespace

import feature_world
import numpy as np
import pytest
import torch
from feature_world import CLASSES, WIDTH

from trainers.ape import APELearner, APETLearner, channel_scores, number_of_channels
from trainers.app import prediction
from trainers.modules import cache
from trainers.modules.cache import cache_accuracy, cache_logits

unit = functools.partial(feature_world.unit, dtype=torch.float32)
world = functools.partial(feature_world.world, dtype=torch.float32)
Q = 7


def naive_scores(texts, weight, samples, labels):
    """Scores of channels: a loop over all pairs of samples of different classes."""
    products = [
        a * b for a, y in zip(samples, labels, strict=True) for b, z in zip(samples, labels, strict=True) if y != z
    ]
    return -weight * np.mean(products, axis=0) + (1 - weight) * np.var(texts, axis=0, ddof=1)


def same(got, want, atol=1e-4):
    torch.testing.assert_close(got, torch.as_tensor(np.asarray(want)).to(got), rtol=1e-5, atol=atol)


def naive_ape(f, w, keys, labels, channels, alpha, beta, gamma, scale=100.0):
    def on(x):
        return x[channels] / np.linalg.norm(x[channels])

    out = np.zeros((len(f), len(w)))
    for i, x in enumerate(f):
        out[i] = scale * w @ x
        for k, y in zip(keys, labels, strict=True):
            say = np.exp([on(k) @ on(t) for t in w])
            divergence = math.log2((1 + 1e-6) / (say[y] / say.sum() + 1e-6))
            out[i, y] += alpha * math.exp(-beta * (1 - on(x) @ on(k))) * math.exp(gamma * divergence)
    return out


def sources(counts=(2, 3, 1, 2, 4)):
    values, labels = world(1, list(counts))
    return unit(6, WIDTH, seed=8), unit(CLASSES, WIDTH, seed=9), values[0], labels


def doubles(*tensors):
    return [tensor.double().numpy() for tensor in tensors]


@pytest.mark.parametrize("counts", [(2, 2, 2, 2, 2), (2, 3, 1, 2, 4), (3, 0, 1, 2, 0)])
def test_scores_of_channels(counts):
    _, w, keys, labels = sources(counts)
    texts, rows = doubles(w, keys)
    everyone = np.concatenate([texts, rows])
    of = np.concatenate([np.arange(CLASSES), labels.numpy()])
    same(channel_scores(w, 0.3, keys, labels), naive_scores(texts, 0.3, everyone, of), atol=1e-9)
    same(channel_scores(w, 0.2), naive_scores(texts, 0.2, texts, range(CLASSES)), atol=1e-9)


def test_one_class_and_few_channels():
    assert channel_scores(unit(1, WIDTH), 0.5).tolist() == [0] * WIDTH
    assert [number_of_channels(share, 12) for share in (0.01, 0.5, 1.0)] == [1, 6, 12]


def make_ape(make_clip, names, w, keys, labels):
    learner = APELearner(make_clip(), names, w, n=len(keys), q=Q, alpha=2.0, beta=3.0, gamma=0.4)
    learner.fill(keys, labels, 0.3)
    return learner


def test_ape(make_clip, names):
    f, w, keys, labels = sources()
    learner = make_ape(make_clip, names, w, keys, labels)
    channels = sorted(channel_scores(w, 0.3, keys, labels).topk(Q).indices.tolist())
    assert learner.channels.tolist() == channels and [name for name, _ in learner.named_parameters()] == []
    same(
        learner(f), naive_ape(*doubles(f, w, keys), labels.tolist(), channels, 2.0, 3.0, 0.4, learner.scale), atol=1e-3
    )


def test_ape_on_a_part_of_the_classes(make_clip, names):
    """Keys of the present classes, the same channels, and divergences among the present classes."""
    f, w, keys, labels = sources()
    whole = make_ape(make_clip, names, w, keys, labels)
    chosen = [3, 0]
    part = APELearner(make_clip(), [names[i] for i in chosen], w[chosen], n=0, q=Q, alpha=0.0, beta=0.0, gamma=0.0)
    part.take({name: value.clone() for name, value in whole.state_dict().items()})
    rows = [i for i, y in enumerate(labels.tolist()) if y in chosen]
    own = [chosen.index(labels[i]) for i in rows]
    want = naive_ape(*doubles(f, w[chosen], keys[rows]), own, whole.channels.tolist(), 2.0, 3.0, 0.4, part.scale)
    same(part(f), want, atol=1e-3)
    with pytest.raises(ValueError, match="Expected classes that were trained on"):
        APELearner(make_clip(), ["lamp"], w[:1], n=0, q=Q, alpha=0.0, beta=0.0, gamma=0.0).take(whole.state_dict())
    with pytest.raises(ValueError, match="Expected channels to have shape"):
        APELearner(make_clip(), names, w, n=0, q=Q - 1, alpha=0.0, beta=0.0, gamma=0.0).take(whole.state_dict())


def naive_apet(f, w, keys, labels, channels, residual, strength, alpha, beta, scale):
    rest = np.zeros_like(w)
    rest[:, channels] = residual
    out = np.zeros((len(f), len(w)))
    for i, x in enumerate(f):
        out[i] = scale * (w + rest) @ x
        for k, y, u in zip(keys, labels, strength, strict=True):
            out[i, y] += alpha * math.exp(-beta * (1 - x @ (k + rest[y]))) * u
    return out


def test_ape_t(make_clip, names):
    """In training with the given alpha and beta, else with those chosen; also for a part of the classes."""
    f, w, keys, labels = sources()
    learner = APETLearner(make_clip(), names, w, n=len(keys), q=Q, alpha=2.0, beta=3.0)
    learner.fill(keys, labels, 0.3)
    assert learner.channels.tolist() == sorted(channel_scores(w, 0.3).topk(Q).indices.tolist())
    torch.manual_seed(0)
    with torch.no_grad():
        learner.residual.normal_(std=0.1)
        learner.strength.uniform_(0.5, 1.5)
    learner.alpha.fill_(1.5)
    learner.beta.fill_(0.7)
    args = (
        doubles(f, w, keys),
        learner.channels.tolist(),
        *doubles(learner.residual.detach(), learner.strength.detach()),
    )
    (x, t, k), channels, residual, strength = args
    want = functools.partial(naive_apet, scale=learner.scale)
    same(learner.train()(f).detach(), want(x, t, k, labels.tolist(), channels, residual, strength, 2.0, 3.0), atol=1e-3)
    same(learner.eval()(f).detach(), want(x, t, k, labels.tolist(), channels, residual, strength, 1.5, 0.7), atol=1e-3)
    chosen = [4, 1]
    part = APETLearner(make_clip(), [names[i] for i in chosen], w[chosen], n=0, q=Q, alpha=0.0, beta=0.0).eval()
    part.take({name: value.clone() for name, value in learner.state_dict().items()})
    rows = [i for i, y in enumerate(labels.tolist()) if y in chosen]
    own = [chosen.index(labels[i]) for i in rows]
    expected = want(x, t[chosen], k[rows], own, channels, residual[chosen], strength[rows], 1.5, 0.7)
    same(part(f).detach(), expected, atol=1e-3)


@pytest.mark.parametrize("at_once", [1, 2**24])
def test_accuracy_over_the_grid(at_once, monkeypatch):
    monkeypatch.setattr(cache, "AT_ONCE", at_once)
    f, w, keys, labels = sources()
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    betas, alphas, strengths = [0.1, 4.0], [0.5, 2.0, 9.0], torch.rand(4, len(keys))
    found = cache_accuracy(f @ w.t(), f @ keys.t(), labels, y, betas, alphas, strengths)
    for i, beta in enumerate(betas):
        for j, alpha in enumerate(alphas):
            for k, strength in enumerate(strengths):
                logits = f @ w.t() + alpha * cache_logits(f @ keys.t(), labels, CLASSES, beta, strength)
                assert float(found[i, j, k]) == pytest.approx(100 * float((logits.argmax(1) == y).float().mean()))


@pytest.fixture
def make_cfg(small_run):
    def make(name, *pairs, **arguments):
        steps = (4, 3, 2) if name == "APE" else (4, 3)
        usual = (f"TRAINER.{name}.VIEWS", 2, f"TRAINER.{name}.SEARCH_STEP", steps, "OPTIM.MAX_EPOCH", 2)
        return small_run(name.lower(), *usual)(name, *pairs, **arguments)

    return make


@pytest.mark.parametrize("name", ["APE", "APET"])
def test_the_first_of_the_best_points_is_chosen(name, make):
    trainer = make(name)
    trainer.train()
    known, learner = trainer.val_loader.all(), trainer.network.learner.eval()
    best = (-1, {})
    with torch.no_grad():
        for beta in (0.1, 1.825, 3.55, 5.275):
            for alpha in (0.1, 2.4, 4.7):
                for gamma in (0.0, 0.5) if name == "APE" else (None,):
                    point = {"beta": beta, "alpha": alpha, **({} if gamma is None else {"gamma": gamma})}
                    for key, value in point.items():
                        getattr(learner, key).fill_(value)
                    hits = int((learner(known.values[0]).argmax(1) == known.labels).sum())
                    best = max(best, (hits, point), key=lambda pair: pair[0])
    assert trainer.selected == {
        key: {"value": pytest.approx(value), "on": "val", "n": len(known)} for key, value in best[1].items()
    }


@pytest.mark.parametrize("name", ["APE", "APET"])
def test_without_validation_images_the_settings_stay(name, make):
    trainer = make(name, f"TRAINER.{name}.ALPHA", 1.25)
    trainer.dm.dataset._val = None
    trainer.val_loader = None
    trainer.train()
    keys = ".BETA, .ALPHA, .GAMMA" if name == "APE" else ".BETA, .ALPHA"
    assert trainer.selected["alpha"] == {"value": 1.25, "on": f"TRAINER.{name}{keys} (no validation set)", "n": 0}
    assert float(trainer.network.learner.alpha) == 1.25


@pytest.mark.parametrize("name", ["APE", "APET"])
def test_a_run_classifies_a_part_of_its_classes_later(name, make, tmp_path):
    trainer = make(name)
    trainer.train()
    args = SimpleNamespace(
        model_dir=str(tmp_path / "run"), load_epoch=None, classes="three,one", cpu=True, debug=False, set=[],
        batch_size=None,
    )  # fmt: skip
    loaded, names = prediction.load_trainer(args)
    assert names == ["three", "one"] and loaded.selected == trainer.selected
    own, whole = loaded.network.learner, trainer.network.learner
    rows = torch.cat([(whole.key_labels == y).nonzero().flatten() for y in (3, 1)]).sort().values
    assert torch.equal(own.keys, whole.keys[rows]) and torch.equal(own.channels, whole.channels)
    args.classes = "three,horse"
    with pytest.raises(ValueError, match="that were trained on"):
        prediction.load_trainer(args)


def test_training_moves_the_residual_and_the_strengths(make):
    trainer = make("APET")
    trainer.train()
    learner = trainer.network.learner
    assert learner.residual.abs().max() > 0 and (learner.strength - 1).abs().max() > 0


@pytest.mark.parametrize(
    ("name", "key", "value", "wanted"),
    [
        ("APE", "CHANNELS", 0.0, "a number"),
        ("APE", "CHANNELS", 1.5, "a number"),
        ("APE", "WEIGHT", -0.1, "a number"),
        ("APET", "ALPHA", math.inf, "a number"),
        ("APE", "SEARCH_SCALE", (7.0, 7.0), "3 numbers, above 0.1, 0.1, 0, but got"),
        ("APE", "SEARCH_SCALE", (7.0, 0.1, 1.0), "3 numbers"),
        ("APET", "SEARCH_SCALE", (7.0, "a"), "2 numbers, above 0.1, 0.1, but got"),
        ("APE", "SEARCH_STEP", (3, 3, 0), "3 whole numbers above 0 but got"),
        ("APET", "SEARCH_STEP", (3, 1.5), "2 whole numbers above 0 but got"),
    ],
)
def test_bad_settings_are_named(name, key, value, wanted, make):
    with pytest.raises(ValueError, match=f"Expected TRAINER.{name}.{key} to be {wanted}"):
        make(name, f"TRAINER.{name}.{key}", value)

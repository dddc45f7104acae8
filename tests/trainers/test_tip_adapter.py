import math

import pytest
import torch

from trainers.clip.features import FeatureSet
from trainers.tip_adapter import TipLearner, search_grid, search_tip, tip_logits


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def naive_tip(f, w, keys, key_labels, alpha, beta, scale):
    """The method's formula over one-hot values, number by number."""
    values = torch.nn.functional.one_hot(key_labels, len(w)).float()
    rows = []
    for x in f:
        weights = torch.stack([torch.exp(-beta * (1 - (x * k).sum())) for k in keys])
        rows.append(torch.stack([scale * (x * c).sum() for c in w]) + alpha * weights @ values)
    return torch.stack(rows)


@pytest.fixture
def data():
    return unit(6, 24), unit(5, 24, seed=1), unit(11, 24, seed=2), torch.arange(11) % 5


def test_logits(data):
    f, w, keys, labels = data
    want = naive_tip(f, w, keys, labels, 1.3, 4.2, 1.0)
    torch.testing.assert_close(tip_logits(f, f @ w.t(), keys, labels, 1.3, 4.2), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_learner(data, make_clip, names, trained):
    f, w, keys, labels = data
    learner = TipLearner(make_clip(), names, w, n=11, alpha=1.3, beta=4.2, trained=trained)
    with torch.no_grad():
        learner.keys.copy_(keys)
        learner.key_labels.copy_(labels)
    torch.testing.assert_close(learner(f), naive_tip(f, w, keys, labels, 1.3, 4.2, 100.0), rtol=1e-4, atol=2e-3)
    assert [name for name, _ in learner.named_parameters()] == (["keys"] if trained else [])


def test_keys_are_means_over_views_normalised():
    views = unit(3, 4, 8)
    keys = FeatureSet(views, torch.arange(4), ()).mean()
    for i in range(4):
        mean = (views[0, i] + views[1, i] + views[2, i]) / 3
        torch.testing.assert_close(keys[i], mean / math.sqrt(float(mean @ mean)))


def test_grid_is_the_source_s():
    assert search_grid(7, 200)[:2] == pytest.approx([0.1, 0.1 + 6.9 / 200])
    assert len(search_grid(3, 20)) == 20
    assert search_grid(3, 20)[-1] == pytest.approx(0.1 + 2.9 * 19 / 20)


def test_search_is_brute_force(data):
    f, w, keys, key_labels = data
    f, labels = unit(40, 24, seed=5), torch.arange(40) % 5
    alphas, betas = search_grid(3, 4), search_grid(7, 5)
    best = (-1.0, None)
    for beta in betas:
        for alpha in alphas:
            logits = naive_tip(f, w, keys, key_labels, alpha, beta, 1.0)
            accuracy = 100 * float((logits.argmax(1) == labels).double().mean())
            if accuracy > best[0]:
                best = (accuracy, (alpha, beta))
    choice = search_tip(f @ w.t(), f @ keys.t(), key_labels, labels, alphas, betas)
    assert (choice.alpha, choice.beta) == best[1]
    assert choice.accuracy == pytest.approx(best[0])


def test_a_part_of_the_classes_keeps_their_keys(data, make_clip, names):
    f, w, keys, labels = data
    clip = make_clip()
    learner = TipLearner(clip, names, w, n=11, alpha=1.0, beta=5.5, trained=True)
    with torch.no_grad():
        learner.keys.copy_(keys)
        learner.key_labels.copy_(labels)
    part = TipLearner(clip, [names[3], names[1]], w[[3, 1]], n=0, alpha=1.0, beta=5.5, trained=True)
    part.take(learner.state_dict())
    torch.testing.assert_close(part(f), learner(f)[:, [3, 1]])
    with pytest.raises(ValueError, match="classes that were trained on"):
        TipLearner(clip, ["desert"], w[:1], n=0, alpha=1.0, beta=5.5, trained=True).take(learner.state_dict())

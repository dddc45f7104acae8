"""Methods that start from the zero-shot class weights: CrossModalProbe, TaskRes, CLAP."""

import math
from types import SimpleNamespace

import pytest
import torch

from trainers.base.losses import balanced_weights, class_loss
from trainers.clap import CLAPLearner, clap_penalty, class_multipliers
from trainers.clip import mean_text_features
from trainers.cross_modal import CrossModalLearner, CrossModalProbe, Outputs, text_rows
from trainers.taskres import TaskResLearner, taskres_logits


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_cosine_logits(f, weights, scale):
    return torch.tensor([[float(scale * (x @ w) / math.sqrt(float(w @ w))) for w in weights] for x in f])


def naive_cross_entropy(logits, labels):
    rows = list(zip(logits.double(), labels.tolist(), strict=True))
    return sum(float(row.exp().sum().log() - row[y]) for row, y in rows) / len(rows)


def test_cross_modal_loss_is_over_the_union():
    logits, labels = normal(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    outputs = Outputs(logits, labels[3:])
    got = CrossModalProbe.loss(SimpleNamespace(class_loss=class_loss), outputs, labels[:3])["loss"]
    assert torch.equal(CrossModalProbe.shown_logits(None, outputs), logits[:3])  # the images come first
    assert float(got) == pytest.approx(naive_cross_entropy(logits, labels), rel=1e-5)


def test_the_mean_absolute_error_is_that_of_probabilities():
    logits, labels = normal(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    rows = logits.double().softmax(dim=1).tolist()
    want = [sum(abs(p - (k == y)) for k, p in enumerate(row)) for row, y in zip(rows, labels.tolist(), strict=True)]
    assert float(class_loss(logits, labels, "mae")) == pytest.approx(sum(want) / len(want), rel=1e-5)
    assert float(class_loss(logits, labels)) == pytest.approx(naive_cross_entropy(logits, labels), rel=1e-5)


@pytest.mark.parametrize("kind", ["ce", "mae"])
def test_balanced_classes_count_the_same(kind):
    logits, labels = normal(6, 5), torch.tensor([0, 4, 2, 2, 0, 2])
    weights = balanced_weights(labels.tolist(), 5)
    by_class = [float(class_loss(logits[labels == label], labels[labels == label], kind)) for label in (0, 2, 4)]
    assert float(class_loss(logits, labels, kind, weights)) == pytest.approx(sum(by_class) / 3, rel=1e-5)
    assert weights[1] == weights[3] == 0  # no image


def test_weights_of_equal_counts_are_left_out():
    assert balanced_weights([0, 2, 1, 1, 2, 0], 4) is None


def test_prompts_come_in_passes_without_the_last_smaller_batch():
    passes = [[text_rows(10, 4, seed=1, step=2 * k + i).tolist() for i in range(2)] for k in range(3)]
    assert all(len(set(first + second)) == 8 and max(first + second) < 10 for first, second in passes)
    assert passes[0] != passes[1] != passes[2]
    assert passes[0][0] == text_rows(10, 4, seed=1, step=0).tolist() != text_rows(10, 4, seed=2, step=0).tolist()
    assert len(text_rows(3, 8, seed=1, step=5)) == 8  # fewer prompts than asked for
    assert len(set(text_rows(8, 8, seed=1, step=5).tolist())) == 8


def test_cross_modal_logits(make_clip, names):
    f, w = unit(4, 24), unit(5, 24, seed=1)
    learner = CrossModalLearner(make_clip(), names, w, w * 2)  # the length of a weight counts
    want = torch.tensor([[float(100 * (x @ c) * 2) for c in w] for x in f])
    torch.testing.assert_close(learner(f), want, rtol=1e-4, atol=4e-3)


def test_taskres_logits(make_clip, names):
    f, base, residual = unit(4, 24), normal(5, 24, seed=1), normal(5, 24, seed=2)
    got = taskres_logits(f, base, residual, 0.5, 10.0)
    torch.testing.assert_close(got, naive_cosine_logits(f, base + 0.5 * residual, 10.0), rtol=1e-5, atol=1e-5)
    learner = TaskResLearner(make_clip(), names, unit(5, 24), base, 0.5)
    torch.testing.assert_close(learner(f), naive_cosine_logits(f, base, 100.0), rtol=1e-4, atol=2e-3)
    assert [name for name, _ in learner.named_parameters()] == ["residual"]


def test_clap_multipliers():
    logits, labels = 3 * normal(7, 4), torch.tensor([0, 1, 1, 3, 3, 3, 0])
    got = class_multipliers(logits, labels)
    for c in range(4):
        right = [
            float(row.exp()[c] / row.exp().sum()) for row, y in zip(logits, labels.tolist(), strict=True) if y == c
        ]
        assert float(got[c]) == pytest.approx(sum(right) / len(right) if right else 0.0, rel=1e-5)


def test_clap_loss(make_clip, names):
    p, base, multipliers = normal(5, 24), normal(5, 24, seed=1), torch.rand(5)
    naive = sum(float(multipliers[c]) * float(((p[c] - base[c]) ** 2).sum()) for c in range(5)) / 5
    assert float(clap_penalty(p, base, multipliers)) == pytest.approx(naive, rel=1e-5)
    f = unit(4, 24)
    learner = CLAPLearner(make_clip(), names, unit(5, 24), base)
    torch.testing.assert_close(learner(f), naive_cosine_logits(f, base, 100.0), rtol=1e-4, atol=2e-3)
    assert float(clap_penalty(learner.prototypes.detach(), learner.base, multipliers)) == 0


def test_text_features_keep_their_length(make_clip, names):
    clip = make_clip()
    got = mean_text_features(clip, names, ["a photo of a {}.", "{} texture."])
    for row, name in zip(got, names, strict=True):
        prompts = [f"a photo of a {name.replace('_', ' ')}.", f"{name.replace('_', ' ')} texture."]
        want = (clip.encode_text(prompts[:1])[0] + clip.encode_text(prompts[1:])[0]) / 2
        torch.testing.assert_close(row, want, rtol=1e-4, atol=1e-5)

"""StatA beside the formulas of its docstring, written out with numpy, image by image."""

import json

import numpy as np
import pytest
import torch
from feature_world import unit
from torch.nn import functional as F

from trainers import stata as module
from trainers.modules import transduction
from trainers.stata import StatALearner, stata

WIDTH, CLASSES = 8, 4


def world(size=25, present=CLASSES, seed=0):
    """Queries [Q, E] of the first `present` classes, ln y [Q, C], and texts [C, E]."""
    centers = unit(CLASSES, WIDTH, seed=seed)
    labels = torch.randint(present, (size,), generator=torch.Generator().manual_seed(seed))
    queries = F.normalize(centers[labels] + 0.7 * unit(size, WIDTH, seed=seed + 1), dim=1)
    texts = F.normalize(centers + 0.5 * unit(CLASSES, WIDTH, seed=seed + 2), dim=1)
    return queries, (8 * queries @ texts.t()).log_softmax(1), texts


def naive(queries, y, texts, lambda_, alpha, soft, chunk):
    size = len(queries)
    first = np.zeros(WIDTH)
    for n, x in enumerate(queries):
        for k, t in enumerate(texts):
            first += y[n, k] * (x - t) ** 2
        if chunk and ((n + 1) % chunk == 0 or n + 1 == size):
            first /= size
    if not chunk:
        first /= size
    means, variances, z = texts.copy(), np.tile(first, (len(texts), 1)), y.copy()
    edges = []
    for n, x in enumerate(queries):
        others = sorted((p for p in range(size) if p != n), key=lambda p, x=x: -float(x @ queries[p]))
        edges += [(n, p, float(x @ queries[p])) for p in others[:3]]
    for turn in range(11):
        likelihood = np.array(
            [
                [
                    -0.5 * np.sum((x - m) ** 2 / v) - 0.5 * np.sum(np.log(v))
                    for m, v in zip(means, variances, strict=True)
                ]
                for x in queries
            ]
        )
        for _ in range(5):
            pull = np.zeros_like(z)
            for n, p, weight in edges:
                pull[n] += weight * z[p]
                pull[p] += weight * z[n]
            z = y**lambda_ * np.exp((likelihood + 50 / 6 * pull) / 50)
            z /= z.sum(1, keepdims=True)
        if turn == 10:
            return z
        for k, t in enumerate(texts):
            count = z[:, k].sum() if soft else np.sum(z.argmax(1) == k)
            beta = count / (alpha + count)
            mean = z[:, k] @ queries / np.linalg.norm(z[:, k] @ queries)
            means[k] = beta * mean + (1 - beta) * t
            means[k] /= np.linalg.norm(means[k])
            own = sum(w * (x - means[k]) ** 2 for x, w in zip(queries, z[:, k], strict=True)) / z[:, k].sum()
            variances[k] = beta * own + (1 - beta) * (first + (means[k] - t) ** 2)


@pytest.mark.parametrize("at_once", [10, 2**24])
@pytest.mark.parametrize(
    ("present", "lambda_", "alpha", "soft", "uneven"),
    [(4, 1.0, 1.0, False, False), (1, 1.0, 1.0, False, True), (2, 2.0, 5.0, True, False)],
)
def test_against_naive(present, lambda_, alpha, soft, uneven, at_once, monkeypatch):
    monkeypatch.setattr(transduction, "AT_ONCE", at_once)
    monkeypatch.setattr(module, "CHUNK", 10)
    queries, log_y, texts = world(present=present)
    got = stata(queries, log_y, texts, lambda_=lambda_, alpha=alpha, soft=soft, uneven=uneven).softmax(1)
    want = naive(queries.numpy(), log_y.exp().numpy(), texts.numpy(), lambda_, alpha, soft, 10 if uneven else 0)
    torch.testing.assert_close(got, torch.as_tensor(want), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("soft", [False, True])
def test_classes_without_queries_and_equal_images_give_numbers(alpha, soft):
    queries = unit(1, WIDTH).repeat(20, 1).float()
    log_y = torch.tensor([0.0, -200.0, -200.0, -200.0]).repeat(20, 1)
    scores = stata(queries, log_y, unit(CLASSES, WIDTH).float(), alpha=alpha, soft=soft)
    assert torch.isfinite(scores).all() and scores.argmax(1).tolist() == [0] * 20


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_few_queries(size, make_clip, names):
    learner = StatALearner(make_clip(), names, unit(5, 24), lambda_=1.0, alpha=1.0, soft=False, uneven=False)
    features = unit(size, 24, seed=2).float()
    logits = learner(features)
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(size))
    if size == 1:
        assert logits.argmax() == learner.clip_logits(features).argmax()


@pytest.fixture
def make_cfg(small_run):
    return small_run("stata", "DATASET.NUM_SHOTS", 1, "TEST.NO_TEST", False)


def test_tasks_of_a_run(make, tmp_path):
    trainer = make("StatA", "TRAINER.STATA.TASK_SIZE", 75, "TRAINER.STATA.NUM_TASKS", 3, "TRAINER.STATA.ALPHA", 2.0)
    assert trainer.get_model_names() == [] and trainer.each_class_has(trainer.cfg) == ""
    assert trainer.network.learner.options["alpha"] == 2.0
    trainer.train()
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert results["test"]["n"] == 225 and list(results["test"]["heads"]) == ["clip", "stata"]
    assert results["params"]["trainable"] == 0


@pytest.mark.parametrize(("key", "value"), [("ALPHA", -1.0), ("SOFT", 2), ("UNEVEN", 2), ("TASK_CLASSES", 0)])
def test_bad_settings_are_named(key, value, make):
    with pytest.raises(ValueError, match=f"Expected TRAINER.STATA.{key} to be .* but got {value}"):
        make("StatA", f"TRAINER.STATA.{key}", value)

"""TransCLIP beside the formulas of its docstring, written out with numpy, image by image."""

import json

import numpy as np
import pytest
import torch
from feature_world import unit
from torch.nn import functional as F

from trainers.modules import transduction
from trainers.modules.transduction import grouped, neighbor_graph
from trainers.transclip import GAMMAS, TransCLIPLearner, describe_supports, transclip

WIDTH, CLASSES = 8, 4


def world(size=25, each=3, seed=0):
    """Queries [Q, E], ln y [Q, C], texts [C, E], supports [S, E] and their labels [S]; class 0 has one support more."""
    centers = unit(CLASSES, WIDTH, seed=seed)
    labels = torch.randint(CLASSES, (size,), generator=torch.Generator().manual_seed(seed))
    queries = F.normalize(centers[labels] + 0.7 * unit(size, WIDTH, seed=seed + 1), dim=1)
    texts = F.normalize(centers + 0.5 * unit(CLASSES, WIDTH, seed=seed + 2), dim=1)
    of = torch.cat([torch.arange(CLASSES).repeat(each), torch.tensor([0])])
    supports = F.normalize(centers[of] + 0.7 * unit(len(of), WIDTH, seed=seed + 3), dim=1)
    return queries, (8 * queries @ texts.t()).log_softmax(1), texts, supports, of


def naive_edges(queries, supports, displaced):
    """Return (row, column, similarity) for each row of the list that the source keeps."""
    rows = [("q", q) for q in range(len(queries))]
    more = [("s", s) for s in range(len(supports))]
    edges = []
    for row, (kind, i) in enumerate(more + rows if displaced else rows + more):
        vector = queries[i] if kind == "q" else supports[i]
        others = [q for q in range(len(queries)) if not (kind == "q" and q == i)]
        order = sorted(others, key=lambda q, vector=vector: -float(vector @ queries[q]))
        if kind == "s" and displaced:
            order = order[1:]
        edges += [(row, q, float(vector @ queries[q])) for q in order[:3]]
    return edges


def naive(queries, y, supports, labels, lambda_, gamma, displaced):
    """Return z, means and variances."""
    size, classes = y.shape
    one_hot = np.eye(classes)[labels]
    if len(supports):
        means = np.array([sum(s for s, c in zip(supports, labels, strict=True) if c == k) for k in range(classes)])
    else:
        means = np.zeros((classes, WIDTH))
        for k in range(classes):
            for q in sorted(range(size), key=lambda q, k=k: -y[q, k])[:8]:
                means[k] += y[q, k] * queries[q]
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    variances, z = np.full(WIDTH, 1 / WIDTH), y.copy()
    edges = naive_edges(queries, supports, displaced)
    for turn in range(11):
        likelihood = np.array([[-0.5 * np.sum((x - m) ** 2 / variances) for m in means] for x in queries])
        for _ in range(5):
            everyone, pull = np.concatenate([z, one_hot]), np.zeros_like(z)
            for row, column, weight in edges:
                pull[column] += weight * everyone[row]
                if row < size:
                    pull[row] += weight * z[column]
            z = y**lambda_ * np.exp((likelihood + 50 / 6 * pull) / 50)
            z /= z.sum(1, keepdims=True)
        if turn == 10:
            return z, means, variances
        means = z.T @ queries / size
        variances, total = np.zeros(WIDTH), 1.0
        if len(supports):
            means += 50 * gamma * one_hot.T @ supports / len(supports)
            total += 50 * gamma
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        for k in range(classes):
            for x, share in zip(queries, z[:, k], strict=True):
                variances += share * (x - means[k]) ** 2 / size
            for x, share in zip(supports, one_hot[:, k], strict=True):
                variances += 50 * gamma * share * (x - means[k]) ** 2 / len(supports)
        variances /= total


@pytest.mark.parametrize("at_once", [10, 2**24])
@pytest.mark.parametrize(("gamma", "displaced"), [(None, False), (0.002, False), (0.2, False), (0.02, True)])
def test_against_naive(gamma, displaced, at_once, monkeypatch):
    monkeypatch.setattr(transduction, "AT_ONCE", at_once)
    queries, log_y, texts, supports, labels = world()
    if gamma is None:
        graph, known, lambda_ = neighbor_graph(queries), None, 1.0
        supports, labels = supports[:0], labels[:0]
    else:
        graph = neighbor_graph(queries, supports, labels, classes=CLASSES, displaced=displaced)
        known, lambda_ = describe_supports(supports, labels, CLASSES), 0.5
    scores, found = transclip(queries, log_y, texts, graph, known, lambda_=lambda_, gamma=gamma or 0.0)
    z, means, variances = naive(
        queries.numpy(), log_y.exp().numpy(), supports.numpy(), labels.numpy(), lambda_, gamma, displaced
    )
    for got, want in ((scores.softmax(1), z), (found.assignments, z), (found.means, means)):
        torch.testing.assert_close(got, torch.as_tensor(want), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.variances[0], torch.as_tensor(variances), rtol=1e-8, atol=1e-10)


def test_sums_over_edges():
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(6, (40,), generator=generator) for _ in range(2))
    weights, values = torch.randn(40, generator=generator).double(), unit(6, 3)
    edges = grouped(rows, columns, weights, 7)
    for row, *_ in edges.groups:
        assert len(row.unique()) == len(row)
    want = torch.zeros(7, 3).double().index_add(0, rows, weights[:, None] * values[columns])
    torch.testing.assert_close(edges.sum(values), want)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("use_supports", [False, True])
@pytest.mark.parametrize("displaced", [False, True])
def test_few_queries(size, use_supports, displaced, make_clip, names):
    learner = TransCLIPLearner(
        make_clip(), names, unit(5, 24), n=5, use_supports=use_supports, lambda_=1.0, gamma=0.02, displaced=displaced
    )
    learner.supports.copy_(unit(5, 24, seed=1))
    learner.support_labels.copy_(torch.arange(5))
    logits = learner(unit(size, 24, seed=2).float())
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(size))


def test_classes_without_queries_and_equal_images_give_numbers():
    queries = unit(1, WIDTH).repeat(20, 1).float()
    log_y = torch.tensor([0.0, -200.0, -200.0, -200.0]).repeat(20, 1)
    scores, found = transclip(queries, log_y, unit(CLASSES, WIDTH), neighbor_graph(queries), lambda_=1.0)
    assert torch.isfinite(scores).all() and torch.isfinite(found.means).all()
    assert scores.argmax(1).tolist() == [0] * 20


def test_part_of_the_classes(make_clip, names):
    texts = unit(5, 24).float()

    def build(classnames, rows, n):
        return TransCLIPLearner(make_clip(), classnames, rows, n=n, use_supports=True, lambda_=0.5, gamma=0.02)

    whole, part = build(names, texts, 10), build([names[3], names[1]], texts[[3, 1]], 4)
    whole.supports.copy_(unit(10, 24, seed=1))
    whole.support_labels.copy_(torch.arange(10) % 5)
    whole.gamma.fill_(0.2)
    part.take({name: value.clone() for name, value in whole.state_dict().items()})
    own = build([names[3], names[1]], texts[[3, 1]], 4)
    own.supports.copy_(whole.supports[[1, 3, 6, 8]])
    own.support_labels.copy_(torch.tensor([1, 0, 1, 0]))
    own.gamma.fill_(0.2)
    features = unit(30, 24, seed=2).float()
    torch.testing.assert_close(part(features), own(features))
    with pytest.raises(ValueError, match="Expected classes that were trained on"):
        build([names[0], "lamp"], texts[:2], 4).take(whole.state_dict())


@pytest.fixture
def make_cfg(small_run):
    return small_run("transclip")


@torch.no_grad()
def test_gamma_is_the_first_of_the_best_on_validation_images(make):
    trainer = make("TransCLIP")
    trainer.train()
    learner, known = trainer.network.learner, trainer.val_loader.all()
    found = []
    for gamma in GAMMAS:
        learner.gamma.fill_(gamma)
        found.append(float((learner(known.values[0]).argmax(1) == known.labels).double().mean()))
    best = GAMMAS[found.index(max(found))]
    assert trainer.selected == {"gamma": {"value": best, "on": "val", "n": 20}}


def test_without_validation_images(make):
    trainer = make("TransCLIP", "TRAINER.TRANSCLIP.GAMMA", 0.07)
    trainer.dm.dataset._val = None
    trainer.val_loader = None
    trainer.train()
    choice = trainer.selected["gamma"]
    assert choice == {"value": 0.07, "on": "TRAINER.TRANSCLIP.GAMMA (no validation set)", "n": 0}
    assert float(trainer.network.learner.gamma) == 0.07


def test_zero_shot_tasks(make, tmp_path):
    pairs = ("TRAINER.TRANSCLIP.TASK_SIZE", 75, "TRAINER.TRANSCLIP.NUM_TASKS", 3, "TEST.NO_TEST", False)
    trainer = make("TransCLIP", "TRAINER.TRANSCLIP.SUPPORTS", False, *pairs)
    assert trainer.get_model_names() == [] and trainer.each_class_has(trainer.cfg) == ""
    assert trainer.network.learner.lambda_ == 1.0
    trainer.train()
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert results["test"]["n"] == 225 and list(results["test"]["heads"]) == ["clip", "transclip"]


@pytest.mark.parametrize(
    ("key", "value"), [("GAMMA", -1.0), ("LAMBDA", -0.5), ("TASK_SIZE", -1), ("SUPPORTS", 2), ("NUM_TASKS", 0)]
)
def test_bad_settings_are_named(key, value, make):
    with pytest.raises(ValueError, match=f"Expected TRAINER.TRANSCLIP.{key} to be .* but got {value}"):
        make("TransCLIP", f"TRAINER.TRANSCLIP.{key}", value)


def test_a_task_that_cannot_be_drawn_is_named(make):
    with pytest.raises(ValueError, match="Expected tasks of at most 10 classes but got 11"):
        make("TransCLIP", "TRAINER.TRANSCLIP.TASK_SIZE", 20, "TRAINER.TRANSCLIP.TASK_CLASSES", 11)

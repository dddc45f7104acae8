"""DAC beside the formulas of its docstring, written out with numpy and loops."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY
from trainers.app import prediction
from trainers.dac import DACLearner, supervised_contrast

WIDTH, CLASSES = 24, 5


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def naive_contrast(rows, labels, temperature):
    terms = []
    for i, row in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        total = math.log(sum(math.exp(row @ rows[j] / temperature) for j in others))
        own = [total - row @ rows[j] / temperature for j in others if labels[j] == labels[i]]
        if own:
            terms.append(np.mean(own))
    return np.mean(terms) if terms else 0.0


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 1, 0], [0, 1, 2, 2, 0, 3], [0, 1, 2, 3, 4, 5]])
def test_contrast(labels):
    rows = unit(6, 8)
    want = naive_contrast(rows.double().numpy(), labels, 0.07)
    rows.requires_grad_(True)
    loss = supervised_contrast(rows, torch.tensor(labels), 0.07)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(want, rel=1e-4) and torch.isfinite(rows.grad).all()


def build(make_clip, names, w, n=0, texts=True):
    learner = DACLearner(make_clip(), names, w, n=n, alpha=2.0, beta=3.0, texts=texts)
    torch.manual_seed(2)
    with torch.no_grad():
        learner.matrix.add_(0.1 * torch.randn(WIDTH, WIDTH))
        if texts:
            learner.texts.add_(0.1 * torch.randn(len(names), WIDTH))
    return learner


def naive_logits(f, texts, keys, labels, matrix, alpha, beta, scale):
    def mapped(x):
        return x @ matrix / np.linalg.norm(x @ matrix)

    out = np.array([[scale * x @ t / np.linalg.norm(t) for t in texts] for x in f])
    for i, x in enumerate(f):
        for k, y in zip(keys, labels, strict=True):
            out[i, y] += alpha * math.exp(-beta * (1 - mapped(x) @ mapped(k)))
    return out


@pytest.mark.parametrize("texts", [False, True])
def test_logits_and_a_part_of_the_classes(make_clip, names, texts):
    """In training with the given alpha and beta, else with those chosen."""
    f, w, keys = unit(6, WIDTH), unit(CLASSES, WIDTH, seed=1), unit(7, WIDTH, seed=3)
    labels = torch.tensor([0, 3, 2, 1, 4, 3, 0])
    learner = build(make_clip, names, w, len(keys), texts)
    learner.keys.copy_(keys)
    learner.key_labels.copy_(labels)
    learner.alpha.fill_(1.5)
    learner.beta.fill_(0.7)
    t = learner.texts.detach() if texts else w
    x, rows, k, matrix = (one.detach().double().numpy() for one in (f, t, keys, learner.matrix))
    for mode, alpha, beta in ((True, 2.0, 3.0), (False, 1.5, 0.7)):
        want = naive_logits(x, rows, k, labels.tolist(), matrix, alpha, beta, learner.scale)
        np.testing.assert_allclose(learner.train(mode)(f).detach(), want, rtol=1e-4, atol=1e-3)
    chosen = [3, 0]
    part = build(make_clip, [names[i] for i in chosen], w[chosen], texts=texts).eval()
    part.take(learner.state_dict())
    torch.testing.assert_close(part(f), learner(f)[:, chosen])
    assert part.key_labels.tolist() == [1, 0, 0, 1]
    with pytest.raises(ValueError, match="Expected classes that were trained on"):
        build(make_clip, ["lamp"], w[:1], texts=texts).take(learner.state_dict())
    with pytest.raises(ValueError, match="Expected a checkpoint made with the same settings"):
        build(make_clip, names, w, texts=not texts).take(learner.state_dict())


@pytest.fixture
def make_cfg(small_run):
    usual = ("TRAINER.DAC.VIEWS", 2, "TRAINER.DAC.SEARCH_STEP", (4, 3), "OPTIM.MAX_EPOCH", 2)
    return small_run("dac", *usual, "DATALOADER.TRAIN_X.BATCH_SIZE", 12)


def test_a_step_has_all_views_of_its_images(make):
    trainer = make("DAC")
    known = trainer.train_features.all()
    for epoch in (0, 1):
        trainer.epoch = epoch
        trainer.before_epoch()
        batch = next(iter(trainer.train_loader_x))
        views, labels = trainer.parse_batch_train(batch)
        torch.testing.assert_close(views, known.values[:, batch["index"]].transpose(0, 1))
        assert labels.tolist() == batch["label"].tolist()
    assert trainer.parse_batch_train({"feature": known.values[0], "label": known.labels})[0].shape[1] == 1


@pytest.mark.parametrize("form", ["V", "VT"])
def test_the_map_is_trained_first_and_the_texts_then(form, make, tmp_path):
    trainer = make("DAC", "TRAINER.DAC.FORM", form, "TRAIN.CHECKPOINT_FREQ", 1, "OPTIM.LR", 0.01)
    start = trainer.network.learner.zeroshot.clone()
    trainer.train()
    steps = [torch.load(tmp_path / "run" / "dac" / f"model.pth.tar-{k}")["state_dict"] for k in (1, 2)]
    eye = torch.eye(len(steps[0]["matrix"]))
    assert not torch.equal(steps[0]["matrix"], eye)
    assert torch.equal(steps[0]["matrix"], steps[1]["matrix"]) == (form == "VT")
    if form == "VT":
        assert torch.equal(steps[0]["texts"], start) and not torch.equal(steps[1]["texts"], start)
    loss = "loss_ce" if form == "VT" else "loss_con"
    assert loss in json.loads((tmp_path / "run" / "metrics.json").read_text())["train"]


def test_the_first_of_the_best_points_is_chosen(make):
    trainer = make("DAC", "TRAINER.DAC.FORM", "VT")
    trainer.train()
    known, learner = trainer.val_loader.all(), trainer.network.learner.eval()
    best = (-1, {})
    for beta in (0.1, 1.825, 3.55, 5.275):
        for alpha in (0.1, 0.1 + 2.9 / 3, 0.1 + 5.8 / 3):
            learner.alpha.fill_(alpha)
            learner.beta.fill_(beta)
            hits = int((learner(known.values[0]).argmax(1) == known.labels).sum())
            best = max(best, (hits, {"beta": beta, "alpha": alpha}), key=lambda pair: pair[0])
    assert trainer.selected == {
        key: {"value": pytest.approx(value), "on": "val", "n": len(known)} for key, value in best[1].items()
    }


def test_without_validation_images_the_settings_stay(make):
    trainer = make("DAC", "TRAINER.DAC.ALPHA", 1.25)
    trainer.dm.dataset._val = None
    trainer.val_loader = None
    trainer.train()
    assert trainer.selected["alpha"] == {"value": 1.25, "on": "TRAINER.DAC.BETA, .ALPHA (no validation set)", "n": 0}
    assert float(trainer.network.learner.alpha) == 1.25


def test_a_run_classifies_a_part_of_its_classes_later(make, tmp_path):
    trainer = make("DAC", "TRAINER.DAC.FORM", "VT")
    trainer.train()
    args = SimpleNamespace(
        model_dir=str(tmp_path / "run"), load_epoch=None, classes="three,one", cpu=True, debug=False, set=[],
        batch_size=None,
    )  # fmt: skip
    loaded, names = prediction.load_trainer(args)
    assert names == ["three", "one"] and loaded.selected == trainer.selected
    own, whole = loaded.network.learner, trainer.network.learner
    rows = torch.cat([(whole.key_labels == y).nonzero().flatten() for y in (3, 1)]).sort().values
    assert torch.equal(own.keys, whole.keys[rows]) and torch.equal(own.texts, whole.texts[[3, 1]])


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("VIEWS", 1, "a whole number, at least 2"),
        ("FORM", "T", "one of V, VT"),
        ("TEXT_SHARE", 1.0, "a number"),
        ("TEMPERATURE", 0.0, "a number"),
        ("SEARCH_SCALE", (7.0, 0.1), "2 numbers, above 0.1, 0.1, but got"),
        ("SEARCH_STEP", (3,), "2 whole numbers above 0 but got"),
    ],
)
def test_bad_settings_are_named(key, value, wanted, make_cfg):
    with pytest.raises(ValueError, match=f"Expected TRAINER.DAC.{key} to be {wanted}"):
        TRAINER_REGISTRY.get("DAC").check_settings(make_cfg("DAC", f"TRAINER.DAC.{key}", value))

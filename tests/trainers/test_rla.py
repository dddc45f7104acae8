"""RLA, and what it shares with ProLIP: a matrix that is held near its start."""

import functools
import json
import math
from types import SimpleNamespace

import feature_world
import numpy as np
import pytest
import torch

from trainers.app import predict, prediction
from trainers.base import AnchoredLearner

WIDTH, CLASSES = 24, 5
FEW_STEPS = ("TRAINER.RLA.VIEWS", 2, "TRAINER.RLA.LAMBDA", 1.0, "OPTIM.LR", 0.01, "OPTIM.MAX_EPOCH", 4)
unit = functools.partial(feature_world.unit, dtype=torch.float32)


@pytest.fixture
def learner(make_clip, names):
    return AnchoredLearner(make_clip(), names, unit(CLASSES, WIDTH, seed=9), start=torch.eye(WIDTH))


@pytest.fixture
def make_cfg(small_run):
    return small_run("rla", *FEW_STEPS)


def naive_training(values, labels, texts, scale, *, lr, weight, epochs):
    """Train the map by the formulas: Adam written out, all images in each step, the views in turn."""
    x, texts = values.double().numpy(), texts.double().numpy()
    a = np.eye(x.shape[2])
    mean, square = np.zeros_like(a), np.zeros_like(a)
    for epoch in range(epochs):
        f, gradient = x[epoch % len(x)], 2 * weight * (a - np.eye(len(a)))
        for row, label in zip(f, labels.tolist(), strict=True):
            through = row @ a
            length = math.sqrt(through @ through)
            logits = scale * texts @ through / length
            p = np.exp(logits - logits.max())
            p /= p.sum()
            p[label] -= 1
            of_unit = scale * p @ texts  # the gradient of the image's feature of length 1
            of_through = (of_unit - through * (of_unit @ through) / length**2) / length
            gradient = gradient + np.outer(row, of_through) / len(f)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        rate = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        first, second = mean / (1 - 0.9 ** (epoch + 1)), square / (1 - 0.999 ** (epoch + 1))
        a = a - rate * first / (np.sqrt(second) + 1e-4)
    return a


def test_logits_and_distance(learner):
    f, texts = unit(7, WIDTH, seed=8), learner.zeroshot
    torch.testing.assert_close(learner(f), learner.clip_logits(f))
    assert learner.distance().item() == 0
    moved = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        learner.matrix.copy_(moved)
    want = np.zeros((7, CLASSES))
    for i, row in enumerate(f.double().numpy() @ moved.double().numpy()):
        for c, text in enumerate(texts.double().numpy()):
            want[i, c] = learner.scale * row @ text / math.sqrt(row @ row)
    np.testing.assert_allclose(learner(f).detach().numpy(), want, atol=2e-3)
    squares = ((moved.double() - torch.eye(WIDTH).double()) ** 2).sum()
    assert learner.distance().item() == pytest.approx(float(squares), rel=1e-5)
    torch.testing.assert_close(learner(3 * f), learner(f))  # a feature's length does not matter
    assert [name for name, _ in learner.named_parameters()] == ["matrix"]


@pytest.mark.parametrize(("power", "weight"), [(1.0, 0.25), (2.0, 0.125), (0.0, 0.5)])
def test_a_run_is_the_naive_one(power, weight, make, tmp_path):
    """Two images per class: the weight of the penalty is 0.5 / 2^power. The last model counts."""
    trainer = make("RLA", "TRAINER.RLA.LAMBDA", 0.5, "TRAINER.RLA.POWER", power)
    assert trainer.penalty_weight() == weight
    trainer.train()
    learner, known = trainer.network.learner, trainer.train_features.all()
    want = naive_training(known.values, known.labels, learner.zeroshot, learner.scale, lr=0.01, weight=weight, epochs=4)
    assert np.abs(want - np.eye(len(want))).max() > 0.01
    np.testing.assert_allclose(learner.matrix.detach().numpy(), want, atol=2e-5)
    assert trainer.selected == {}  # nothing is chosen
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["params"]["trainable"] == learner.matrix.numel() == 32 * 32


def test_the_penalty_goes_by_the_images_that_are_there(make):
    trainer = make("RLA", "DATASET.NUM_SHOTS", 4)
    del trainer.dm.dataset.train_x[30:]
    assert trainer.penalty_weight() == pytest.approx(1 / 3)


def test_a_strong_penalty_leaves_clip_as_it_is(make):
    def moved(strength):
        trainer = make("RLA", "TRAINER.RLA.LAMBDA", strength, "OPTIM.MAX_EPOCH", 60, "OPTIM.LR", 0.001, out=strength)
        trainer.train()
        return trainer.network.learner.distance().item()

    none, some, strong = (moved(strength) for strength in ("0.0", "1.0", "1000.0"))
    assert none > some > strong and strong < 1e-3


@pytest.mark.skipif(torch.__version__ < "2.6", reason="the CPU lacks the distance in half precision")
def test_in_half_precision(make, tmp_path):
    """What is learnt and the optimizer's averages are float16, also after loading; so are the logits' last digits."""
    trainer = make("RLA", "TRAINER.RLA.HALF", True)
    trainer.train()
    learner = trainer.network.learner
    state = next(iter(trainer._optim.state.values()))
    assert {learner.matrix.dtype, state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {torch.float16}
    assert learner.start.dtype == torch.float32 and learner.distance().item() > 0
    f = trainer.test_loader.all().values[0]
    logits = trainer.model_heads(f)["rla"]
    assert logits.dtype == torch.float32 and torch.equal(logits, logits.half().float())
    other = make("RLA", "TRAINER.RLA.HALF", True, out="other")
    other.load_model(str(tmp_path / "run"))
    assert torch.equal(other.network.learner.matrix, learner.matrix)
    assert torch.equal(other.model_heads(f)["rla"], logits)
    full = make("RLA", out="full")
    full.load_model(str(tmp_path / "run"))
    torch.testing.assert_close(full.model_heads(f)["rla"], logits, rtol=2e-2, atol=0.3)


def test_a_run_classifies_any_classes_later(make, tmp_path):
    trainer = make("RLA")
    trainer.train()
    learner = trainer.network.learner
    path = trainer.dm.dataset.test[0].impath
    f = trainer.test_loader.all().values[0][:1]
    for classes in ("three,one", "three,horse"):
        args = SimpleNamespace(
            model_dir=str(tmp_path / "run"), load_epoch=None, classes=classes, cpu=True, debug=False, set=[],
            batch_size=None,
        )  # fmt: skip
        loaded, names = prediction.load_trainer(args)
        assert names == classes.split(",")
        other = loaded.network.learner
        assert torch.equal(other.matrix, learner.matrix)
        predictions, unreadable, _ = predict.predict(prediction.Model(loaded, names), [(path, path)])
        want = learner.scale * torch.nn.functional.normalize(f @ learner.matrix, dim=-1) @ other.zeroshot.t()
        assert not unreadable
        torch.testing.assert_close(predictions[0].probabilities, want[0].softmax(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (("TRAINER.RLA.LAMBDA", -1.0), "Expected TRAINER.RLA.LAMBDA to be a number, at least 0"),
        (("TRAINER.RLA.POWER", math.inf), "Expected TRAINER.RLA.POWER to be a number, at least 0"),
        (("TRAINER.RLA.VIEWS", -1), "Expected TRAINER.RLA.VIEWS to be a whole number, at least 0"),
        (("TRAINER.RLA.HALF", True, "TRAINER.RLA.PREC", "amp"), "RLA.PREC to be fp32 or bf16 where .HALF is True"),
    ],
)
def test_bad_settings_are_named(pairs, message, make):
    with pytest.raises(ValueError, match=message):
        make("RLA", *pairs)

"""FAR beside the formulas of its docstring, written out with numpy and loops."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY
from trainers.far import FAR, FARLearner, Outputs

CLASSES, HIDDEN = 5, 9
SETTINGS = {"ratio": 0.3, "hidden": HIDDEN, "beta": 0.25}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(make_clip, names, kind="vit", w=None, **settings):
    clip = make_clip(kind)
    torch.manual_seed(4)
    w = F.normalize(normal(len(names), clip.embed_dim, seed=1), dim=1) if w is None else w
    return FARLearner(clip, names, w, **{**SETTINGS, **settings})


def naive_norm(rows, norm):
    """BatchNorm of a batch: by its mean and its biased variance."""
    gain, shift = norm.weight.detach().double().numpy(), norm.bias.detach().double().numpy()
    return (rows - rows.mean(axis=0)) / np.sqrt(rows.var(axis=0) + 1e-5) * gain + shift


def numbers(*tensors):
    return [tensor.detach().double().numpy() for tensor in tensors]


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_outputs(make_clip, names, kind):
    learner = build(make_clip, names, kind).train()
    x = normal(6, len(learner.start), seed=2)
    with torch.no_grad():
        for norm in (learner.adapter_norm, learner.hidden_norm):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
    a, d, b, start, w = numbers(
        learner.adapter.weight, learner.hidden.weight, learner.classifier.weight, learner.start, learner.zeroshot
    )
    (f,) = numbers(x)
    bias = 0.0 if learner.bias is None else numbers(learner.bias)[0]
    moved = 0.7 * f + 0.3 * np.maximum(naive_norm(f @ a.T, learner.adapter_norm), 0)
    g = moved @ start + bias
    own = np.maximum(naive_norm(g @ d.T, learner.hidden_norm), 0) @ b.T
    plain = np.stack([row / np.linalg.norm(row) for row in f @ start + bias])
    got = learner.outputs(x)
    for value, want in zip(got, (own, learner.scale * plain @ w.T, plain, g), strict=True):
        np.testing.assert_allclose(value.detach(), want, rtol=1e-3, atol=1e-3)
    assert (learner.bias is None) == (kind == "vit")
    learner.eval()
    outputs = learner.outputs(x)
    torch.testing.assert_close(learner(x), 0.25 * outputs.own + 0.75 * outputs.clip_logits)


def test_loss():
    own, clip_logits, g = normal(6, CLASSES), 9 * normal(6, CLASSES, seed=1), 3 * normal(6, 8, seed=3)
    plain, labels = F.normalize(normal(6, 8, seed=2), dim=1), torch.tensor([0, 1, 2, 3, 4, 0])
    trainer = SimpleNamespace(settings=SimpleNamespace(gamma=0.3, delta=0.01), class_loss=F.cross_entropy)
    terms = FAR.loss(trainer, Outputs(own, clip_logits, plain, g), labels)
    divergences = []
    for p, q in zip(*numbers(plain, g), strict=True):
        p, q = np.exp(p) / np.exp(p).sum(), np.exp(q) / np.exp(q).sum()
        divergences.append((p * np.log(p / q)).sum())
    o, c = numbers(own, clip_logits)
    want = {
        "loss_ce": float(F.cross_entropy(own, labels)),
        "loss_l1": 0.3 * np.abs(o - c).mean(),
        "loss_kl": -0.01 * np.mean(divergences),
    }
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(want, rel=1e-5)


def test_one_image_alone_takes_the_running_statistics(make_clip, names):
    learner, x = build(make_clip, names), normal(1, 64, seed=2)
    x = normal(1, len(learner.start), seed=2)
    before = {name: value.clone() for name, value in learner.state_dict().items() if name != "_extra_state"}
    torch.testing.assert_close(learner.train().outputs(x).own, learner.eval().outputs(x).own)
    assert all(torch.equal(learner.state_dict()[name], value) for name, value in before.items())


def test_a_part_of_the_classes(make_clip, names):
    whole, chosen = build(make_clip, names).eval(), [3, 1]
    part = build(make_clip, [names[i] for i in chosen], w=whole.zeroshot[chosen]).eval()
    part.take(whole.state_dict())
    x = normal(4, len(whole.start), seed=5)
    torch.testing.assert_close(part(x), whole(x)[:, chosen])
    with pytest.raises(ValueError, match="Expected classes that were trained on"):
        build(make_clip, ["lamp"], w=whole.zeroshot[:1]).take(whole.state_dict())
    with pytest.raises(ValueError, match="Expected classifier.weight to have shape"):
        build(make_clip, names, hidden=HIDDEN + 1).take(whole.state_dict())


@pytest.fixture
def make_cfg(small_run):
    return small_run("far", "TRAINER.FAR.VIEWS", 2, "OPTIM.MAX_EPOCH", 2, "OPTIM.WARMUP_EPOCH", 0)


def test_the_least_of_the_best_shares_is_chosen(make, tmp_path):
    trainer = make("FAR", "DATALOADER.TRAIN_X.BATCH_SIZE", 19)  # the last batch has one image
    trainer.train()
    known, learner = trainer.val_loader.all(), trainer.network.learner.eval()
    outputs = learner.outputs(known.values[0])
    hits = [
        int(((beta * outputs.own + (1 - beta) * outputs.clip_logits).argmax(1) == known.labels).sum())
        for beta in (i / 50 for i in range(51))
    ]
    beta = hits.index(max(hits)) / 50
    assert trainer.selected == {"beta": {"value": pytest.approx(beta), "on": "val", "n": len(known)}}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"loss_ce", "loss_l1", "loss_kl"} <= metrics["train"].keys()
    again = make("FAR", out="other")
    again.load_model(str(tmp_path / "run"))
    assert again.selected == trainer.selected
    again.set_model_mode("eval")
    torch.testing.assert_close(again.network.learner(known.values[0]), learner(known.values[0]))


def test_without_validation_images_the_share_stays(make):
    trainer = make("FAR", "TRAINER.FAR.BETA", 0.75)
    trainer.dm.dataset._val = None
    trainer.val_loader = None
    trainer.train()
    assert trainer.selected["beta"] == {"value": 0.75, "on": "TRAINER.FAR.BETA (no validation set)", "n": 0}
    assert float(trainer.network.learner.beta) == 0.75


@pytest.mark.parametrize(
    ("key", "value"), [("RATIO", 0.0), ("RATIO", 1.5), ("HIDDEN", 0), ("BETA", 1.1), ("GAMMA", -1)]
)
def test_bad_settings_are_named(key, value, make_cfg):
    with pytest.raises(ValueError, match=f"Expected TRAINER.FAR.{key} to be a"):
        TRAINER_REGISTRY.get("FAR").check_settings(make_cfg("FAR", f"TRAINER.FAR.{key}", value))

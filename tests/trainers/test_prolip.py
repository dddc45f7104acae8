"""ProLIP: the projection of the image encoder, on features before it."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trainers.app import predict, prediction
from trainers.prolip import ProLIPLearner

FEW_STEPS = ("TRAINER.PROLIP.VIEWS", 2, "TRAINER.PROLIP.LAMBDA", 1.0, "OPTIM.LR", 0.01, "OPTIM.MAX_EPOCH", 4)


@pytest.fixture
def make_cfg(small_run):
    return small_run("prolip", *FEW_STEPS)


@pytest.fixture
def learner(make_clip, names, kind):
    clip = make_clip(kind)
    zeroshot = F.normalize(torch.randn(len(names), 24, generator=torch.Generator().manual_seed(2)), dim=-1)
    weight, bias = clip.visual.projection()
    return clip, ProLIPLearner(clip, names, zeroshot, start=weight, bias=bias)


def with_projection(clip, weight):
    """A CLIP whose image encoder has another projection."""
    other = copy.deepcopy(clip)
    with torch.no_grad():
        other.visual.projection()[0].copy_(weight)
    return other


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_it_is_clip_with_another_projection(learner, images):
    clip, learner = learner
    x, texts = clip.pool_image(images), learner.zeroshot
    want = clip.logit_scale * F.normalize(clip.encode_image(images), dim=-1) @ texts.t()
    torch.testing.assert_close(learner.clip_logits(x), want, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(learner(x), want, rtol=1e-4, atol=1e-3)
    moved = learner.start + 0.1 * torch.randn(learner.start.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        learner.matrix.copy_(moved)
    features = with_projection(clip, moved).encode_image(images)
    moved_want = clip.logit_scale * F.normalize(features, dim=-1) @ texts.t()
    torch.testing.assert_close(learner(x), moved_want, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(learner.clip_logits(x), want, rtol=1e-4, atol=1e-3)  # CLIP has not moved
    assert learner.distance().item() == pytest.approx(float(((moved - learner.start).double() ** 2).sum()), rel=1e-5)
    assert [name for name, _ in learner.named_parameters()] == ["matrix"]
    assert set(learner.state_dict()) == {"matrix", "prepared", "_extra_state"}


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_checkpoint_is_for_one_clip(learner, make_clip, names, kind):
    clip, learner = learner
    with torch.no_grad():
        learner.matrix.mul_(2)
    state = learner.state_dict()
    weight, bias = clip.visual.projection()
    new = ProLIPLearner(clip, ["lamp", "cup"], learner.zeroshot[:2], start=weight, bias=bias)
    new.take(state)
    assert torch.equal(new.matrix, learner.matrix)
    other = make_clip(kind, seed=1)
    weight, bias = other.visual.projection()
    with pytest.raises(ValueError, match="Expected a checkpoint for CLIP weights with sha256"):
        ProLIPLearner(other, names, learner.zeroshot, start=weight, bias=bias).take(state)
    weight, bias = clip.visual.projection()
    with pytest.raises(ValueError, match="Expected a checkpoint for backbone 'another' but got"):
        ProLIPLearner(renamed(clip), names, learner.zeroshot, start=weight, bias=bias).take(state)


def renamed(clip):
    other = copy.deepcopy(clip)
    other.name = "another"
    return other


def test_a_run_moves_the_projection_and_nothing_else(make, tmp_path):
    trainer = make("ProLIP")
    before = {name: value.clone() for name, value in trainer.network.clip.state_dict().items()}
    trainer.train()
    learner, known = trainer.network.learner, trainer.train_features.all()
    assert known.values.shape == (2, 20, 64)  # the width of the tower, not of the texts
    for name, value in trainer.network.clip.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert trainer.selected == {} and learner.matrix.shape == (64, 32)
    w = torch.nn.Parameter(learner.start.double())  # the same steps, by autograd
    optim = torch.optim.Adam([w], lr=0.01, eps=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, 4)
    for epoch in range(4):
        f = F.normalize(known.values[epoch % 2].double() @ w, dim=-1)
        logits = learner.scale * f @ learner.zeroshot.double().t()
        loss = F.cross_entropy(logits, known.labels) + 0.5 * (w - learner.start.double()).pow(2).sum()
        optim.zero_grad()
        loss.backward()
        optim.step()
        schedule.step()
    np.testing.assert_allclose(learner.matrix.detach().numpy(), w.detach().numpy(), atol=2e-5)
    loaded, names = prediction.load_trainer(
        SimpleNamespace(
            model_dir=str(tmp_path / "run"), load_epoch=None, classes="three,horse", cpu=True, debug=False, set=[],
            batch_size=None,
        )
    )  # fmt: skip
    path = trainer.dm.dataset.test[0].impath
    predictions, unreadable, _ = predict.predict(prediction.Model(loaded, names), [(path, path)])
    x = trainer.test_loader.all().values[0][:1]
    want = learner.scale * F.normalize(x @ learner.matrix, dim=-1) @ loaded.network.learner.zeroshot.t()
    assert names == ["three", "horse"] and not unreadable
    torch.testing.assert_close(predictions[0].probabilities, want[0].softmax(0), rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(torch.__version__ < "2.6", reason="the CPU lacks the distance in half precision")
def test_in_half_precision_the_zero_shot_head_stays(make):
    plain, half = make("ProLIP", out="plain"), make("ProLIP", "TRAINER.PROLIP.HALF", True)
    f = plain.test_loader.all().values[0]
    torch.testing.assert_close(half.model_heads(f)["clip"], plain.model_heads(f)["clip"])
    assert not torch.equal(half.model_heads(f)["prolip"], plain.model_heads(f)["prolip"])
    half.train()
    assert half.network.learner.matrix.dtype == torch.float16 and half.network.learner.distance().item() > 0


def test_bad_settings_are_named(make):
    with pytest.raises(ValueError, match="Expected TRAINER.PROLIP.LAMBDA to be a number, at least 0"):
        make("ProLIP", "TRAINER.PROLIP.LAMBDA", -1.0)
    with pytest.raises(ValueError, match="Expected MODEL.IMO_WEIGHTS to be '' for ProLIP"):
        make("ProLIP", "MODEL.IMO_WEIGHTS", "adapters.safetensors")

import math

import open_clip
import pytest
import torch
from random_clip import random_open_clip
from torch.nn import functional as F

from trainers.cliplora import CLIPLoRAConfig, LoRAClassifier, LoRALearner
from trainers.modules.low_rank import LowRank

TEMPLATE = "a blurry photo of a {}."


def naive_logits(model, learner, images, names, alpha=1.0):
    """CLIP's own forward with W + alpha / sqrt(r) * B A in the place of each projection's weight W."""
    sides = ((learner.visual, model.visual.transformer.resblocks), (learner.text, model.transformer.resblocks))
    weights = dict(model.named_parameters())
    for updates, blocks in sides:
        prefix = "visual.transformer" if updates is learner.visual else "transformer"
        for i in range(len(blocks)):
            delta = [u.B @ u.A * alpha / math.sqrt(len(u.A)) for u in (updates[str(i + 1)][p] for p in "qkv")]
            name = f"{prefix}.resblocks.{i}.attn.in_proj_weight"
            weights[name] = weights[name].detach() + torch.cat(delta)
    prompts = open_clip.tokenize([TEMPLATE.format(name.replace("_", " ")) for name in names])
    image, text, _ = torch.func.functional_call(model, weights, (images, prompts))  # both normalized
    return model.logit_scale.exp().detach() * image @ text.t()


@pytest.fixture
def make(make_clip, names):
    def build(kind="vit", classnames=names, scatter=True, **arguments):
        clip = make_clip(kind)
        torch.manual_seed(3)
        learner = LoRALearner(clip, classnames, CLIPLoRAConfig(**{"dropout": 0.0, **arguments}))
        if scatter:
            with torch.no_grad():
                for name, p in learner.named_parameters():
                    if name.endswith(".B"):
                        p.normal_(std=0.2)
        return LoRAClassifier(clip, classnames, [TEMPLATE], learner)

    return build


@pytest.mark.parametrize(("rank", "alpha"), [(2, 1.0), (1, 3.0)])
def test_logits_and_gradients_are_the_naive_ones(make, images, labels, names, rank, alpha):
    classifier = make(rank=rank, alpha=alpha)
    classifier.train()
    model, learner = random_open_clip(), classifier.learner
    model.train()  # else open_clip's attention takes a path without gradients
    want = naive_logits(model, learner, images, names, alpha)
    got = classifier(images)
    torch.testing.assert_close(got / 100, want / 100, rtol=0, atol=1e-5)
    learnt = list(learner.parameters())
    want_grads = torch.autograd.grad(F.cross_entropy(want, labels), learnt)
    got_grads = torch.autograd.grad(F.cross_entropy(got, labels), learnt)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(classifier.eval().both(images)[1], got, rtol=1e-5, atol=1e-4)


def test_at_the_start_it_is_clip(make, images):
    zero_shot, logits = make(scatter=False).eval().both(images)
    torch.testing.assert_close(logits, zero_shot, rtol=1e-5, atol=1e-4)


def test_every_projection_of_every_block_is_updated(make):
    learner = make().learner
    shapes = {name: tuple(p.shape) for name, p in learner.named_parameters()}
    assert len(shapes) == 2 * 3 * (4 + 4)
    assert shapes["visual.4.q.A"] == (2, 48) and shapes["visual.4.q.B"] == (48, 2)
    assert shapes["text.1.v.A"] == (2, 32) and shapes["text.1.v.B"] == (32, 2)


def test_dropout_is_each_prompt_s_own_and_in_training_only(make):
    classifier = make(classnames=["river", "river"], dropout=0.5)
    first, second = classifier.train().text_features().detach()
    assert not torch.allclose(first, second, atol=1e-4)
    first, second = classifier.eval().text_features()
    torch.testing.assert_close(first, second)
    classifier.learner.dropout = 0.0
    plain = classifier.text_features()
    torch.testing.assert_close(first, plain[0])


def test_low_rank_drops_inputs(make):
    module = LowRank(4, rank=2, alpha=2.0, dropout=0.25)
    with torch.no_grad():
        module.A.fill_(1.0)
        module.B.fill_(1.0)
    x = torch.ones(4000, 4)
    values = module.train()(x).detach()[:, 0] / (2 * math.sqrt(2))  # sum of the kept ones over 0.75
    assert set(values.mul(0.75).round().int().tolist()) == {0, 1, 2, 3, 4}
    assert values.mean().item() == pytest.approx(4, abs=0.15)
    torch.testing.assert_close(module.eval()(x)[0, 0].item(), 4 * 2 * math.sqrt(2))


def test_resnet_is_refused(make):
    with pytest.raises(ValueError, match="vision transformer for CLIPLoRA"):
        make("resnet")


def test_a_checkpoint_of_another_rank_or_alpha(make):
    with pytest.raises(ValueError, match=r"\(4, 32\) but got \(2, 32\)"):
        make(rank=4).learner.take(make().learner.state_dict())
    with pytest.raises(ValueError, match="alpha 2.0 but got 1.0"):
        make(alpha=2.0).learner.take(make().learner.state_dict())

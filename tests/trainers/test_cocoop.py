import open_clip
import pytest
import torch
from naive_text import encode_embedded
from random_clip import random_open_clip
from torch.nn import functional as F

from trainers.cocoop import CoCoOpClassifier, CoCoOpConfig, ConditionalPromptLearner


def naive_logits(model, learner, images, names, words=""):
    """Published CoCoOp in plain tensors: all 77 tokens of all classes for every image."""
    n, net = len(learner.ctx), learner.meta_net
    ids = open_clip.tokenize([f"{words or ' '.join('X' * n)} {name.replace('_', ' ')}." for name in names])
    embedded = model.token_embedding(ids)
    features = F.normalize(model.encode_image(images), dim=-1)
    hidden = F.relu(features @ net.linear1.weight.t() + net.linear1.bias)
    shifts = hidden @ net.linear2.weight.t() + net.linear2.bias
    rows = []
    for feature, shift in zip(features, shifts, strict=True):
        context = (learner.ctx + shift).expand(len(names), -1, -1)
        text = encode_embedded(model, torch.cat([embedded[:, :1], context, embedded[:, 1 + n :]], dim=1), ids)
        rows.append(model.logit_scale.exp() * feature @ text.t())
    return torch.stack(rows)


@pytest.fixture
def make(make_clip, names):
    def build(kind="vit", classnames=names, **arguments):
        clip = make_clip(kind)
        torch.manual_seed(3)
        learner = ConditionalPromptLearner(clip, classnames, CoCoOpConfig(**{"n_ctx": 5, **arguments}))
        return CoCoOpClassifier(clip, classnames, ["a photo of a {}."], learner)

    return build


@pytest.mark.parametrize("words", ["", "a photo of a"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_logits_and_gradients_are_the_naive_ones(make, images, labels, names, kind, words):
    classifier = make(kind, ctx_init=words)
    classifier.train()
    model, learner = random_open_clip(kind), classifier.learner
    want = naive_logits(model, learner, images, names, words)
    got = classifier(images)
    torch.testing.assert_close(got / 100, want / 100, rtol=0, atol=1e-5)
    learnt = list(learner.parameters())
    want_grads = torch.autograd.grad(F.cross_entropy(want, labels), learnt)
    got_grads = torch.autograd.grad(F.cross_entropy(got, labels), learnt)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(classifier.eval().both(images)[1], got)


def test_published_names_and_sizes(make):
    learner = make().learner
    shapes = {name: tuple(p.shape) for name, p in learner.named_parameters()}
    assert shapes == {
        "ctx": (5, 32),
        "meta_net.linear1.weight": (1, 24),  # 24 / 16
        "meta_net.linear1.bias": (1,),
        "meta_net.linear2.weight": (32, 1),
        "meta_net.linear2.bias": (32,),
    }
    assert set(learner.state_dict()) == {*shapes, "token_prefix", "token_suffix", "_extra_state"}


def test_published_checkpoint(make):
    """Half precision, full-length token buffers of other classes, no record."""
    learner = make().learner
    state = {name: torch.randn_like(p).half() for name, p in learner.named_parameters()}
    tokens = {"token_prefix": torch.randn(40, 1, 32), "token_suffix": torch.randn(40, 71, 32)}
    learner.take({**state, **tokens})
    assert all(torch.equal(p, state[name].float()) for name, p in learner.named_parameters())


def test_a_coop_checkpoint_is_refused(make):
    state = {name: value for name, value in make().learner.state_dict().items() if "meta_net" not in name}
    with pytest.raises(ValueError, match="lacks .*meta_net"):
        make().learner.take(state)

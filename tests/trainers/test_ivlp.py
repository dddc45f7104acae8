"""IVLP and VPT: tokens of both encoders, or of the image encoder, that know nothing of each other."""

import naive_deep
import pytest
import torch
from random_clip import random_open_clip
from torch.nn import functional as F

from trainers.base.deep_prompts import DeepPromptClassifier, IndependentLearner
from trainers.vpt import VPTClassifier, VPTConfig

TEMPLATE = "itap of a {}."


def enlarge(learner):
    with torch.no_grad():
        for p in learner.parameters():
            p.mul_(10)


@pytest.fixture
def make(make_clip, names):
    def build(classnames=names, n_text=2, n_image=3, depth_text=3, depth_image=2):
        clip = make_clip()
        torch.manual_seed(3)
        learner = IndependentLearner(clip, classnames, n_text, n_image, depth_text, depth_image, "a_photo of a", "IVLP")
        enlarge(learner)
        return DeepPromptClassifier(clip, classnames, [TEMPLATE], learner)

    return build


@pytest.fixture
def make_vpt(make_clip, names):
    def build(classnames=names, **arguments):
        clip = make_clip()
        torch.manual_seed(3)
        network = VPTClassifier(clip, classnames, [TEMPLATE], VPTConfig(**{"prompt_depth_vision": 9, **arguments}))
        enlarge(network.learner)
        return network

    return build


def tokens_of(part):
    """block -> tokens, from the names of the parameters."""
    found = {}
    for name, p in part.named_parameters():
        found[1 if name == "VPT" else int(name.split(".")[2]) + 1] = p
    return found


def compare(classifier, want, images, labels):
    learnt = list(classifier.learner.parameters())
    got = classifier.train().outputs(images).logits
    torch.testing.assert_close(got / 100, want / 100, rtol=0, atol=1e-5)
    want_grads = torch.autograd.grad(F.cross_entropy(want, labels), learnt)
    got_grads = torch.autograd.grad(F.cross_entropy(got, labels), learnt)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(classifier.eval().both(images)[1], got, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"depth_text": 1, "depth_image": 1}, {"depth_text": 12, "depth_image": 12, "n_text": 4}, {"depth_image": 0}],
    ids=str,
)
def test_logits_and_gradients_are_the_naive_ones(make, images, labels, names, arguments):
    classifier = make(**arguments)
    model, learner = random_open_clip(), classifier.learner
    prompts = [f"a photo of a {name.replace('_', ' ')}." for name in names]
    ctx = learner.prompt_learner.ctx
    texts = naive_deep.encode_texts(model, prompts, ctx, tokens_of(learner.text_encoder))
    image = naive_deep.image_features(model, images, tokens_of(learner.image_encoder))
    compare(classifier, naive_deep.logits(model, image, texts), images, labels)


@pytest.mark.parametrize("arguments", [{}, {"prompt_depth_vision": 1, "n_ctx_vision": 8}, {"ctx_init": ""}], ids=str)
def test_vpt_is_the_naive_one(make_vpt, images, labels, names, arguments):
    classifier = make_vpt(**arguments)
    words = arguments.get("ctx_init", "a photo of a")
    model = random_open_clip()
    texts = naive_deep.encode_texts(model, [f"{words} {name.replace('_', ' ')}.".strip() for name in names])
    image = naive_deep.image_features(model, images, tokens_of(classifier.learner.image_encoder))
    compare(classifier, naive_deep.logits(model, image, texts.detach()), images, labels)


def test_published_names_and_checkpoints(make, make_vpt):
    image = {"image_encoder.VPT": (3, 48), "image_encoder.transformer.resblocks.1.VPT_shallow": (3, 48)}
    text = {f"text_encoder.transformer.resblocks.{i}.VPT_shallow": (2, 32) for i in (1, 2)}
    learner, vpt = make().learner, make_vpt(prompt_depth_vision=2, n_ctx_vision=3).learner
    for one, want in ((learner, {"prompt_learner.ctx": (2, 32), **image, **text}), (vpt, image)):
        assert {name: tuple(p.shape) for name, p in one.named_parameters()} == want
        state, learnt = naive_deep.published(one)
        one.take(state)
        assert all(torch.equal(p, learnt[name].float()) for name, p in one.named_parameters())
    deeper, _ = naive_deep.published(make(depth_image=3).learner)
    with pytest.raises(ValueError, match="has .*image_encoder.transformer.resblocks.2.VPT_shallow"):
        make().learner.take(deeper)  # tokens are never taken for weights of CLIP


def test_other_classes(make, make_vpt, images):
    for build in (make, make_vpt):
        trained, other = build(), build(classnames=["meadow", "sea lake"])
        other.learner.take(trained.learner.state_dict())
        torch.testing.assert_close(
            other.eval().both(images)[1][:, 1], trained.eval().both(images)[1][:, 3], rtol=1e-4, atol=1e-3
        )


def test_without_image_tokens_the_image_tower_is_frozen(make, images):
    classifier = make(depth_image=0)
    assert classifier.first_adapted is None and classifier.frozen_part(images).features is not None

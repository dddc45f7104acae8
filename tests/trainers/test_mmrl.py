"""MMRL and MMRL++: tokens in the later layers of both encoders, and a second image feature."""

import naive_deep
import pytest
import torch
from random_clip import random_open_clip
from torch.nn import functional as F

from dassl.engine import build_trainer
from trainers.base.representations import RepresentationClassifier, RepresentationConfig
from trainers.mmrl import MMRL, MMRLLearner
from trainers.mmrlpp import MMRLPPConfig, MMRLPPLearner

TEMPLATE = "a photo of a {}, a type of place."
SMALL = {"n_rep_tokens": 3, "rep_start": 2, "rep_dim": 10}
MORE = {"beta": 0.6, "proj_lora_dim": 5, "res_lora_dim": 2}


@pytest.fixture
def make(make_clip, names):
    def build(which="MMRL", classnames=names, template=TEMPLATE, kind="vit", **arguments):
        clip = make_clip(kind)
        torch.manual_seed(3)
        if which == "MMRL":
            settings = RepresentationConfig(**{**SMALL, **arguments})
            learner = MMRLLearner(clip, classnames, settings)
        else:
            settings = MMRLPPConfig(**{**SMALL, **MORE, **arguments})
            learner = MMRLPPLearner(clip, classnames, settings)
        with torch.no_grad():
            for p in learner.parameters():
                p.mul_(5).add_(0.1 * torch.randn(p.shape))  # also what starts at zero
        return RepresentationClassifier(clip, classnames, [template], learner, settings)

    return build


def naive(model, learner, images, names, template, beta=1.0):
    """(logits of the class token, of the tokens, image features, text features), the features normalized."""
    own, blocks = learner.representation_learner, list(learner.blocks)
    tokens = own.compound_rep_tokens
    if beta == 1.0:
        sides = own.compound_rep_tokens_r2vproj, own.compound_rep_tokens_r2tproj
        image, text = ([tokens @ m.weight.t() + m.bias for m in maps] for maps in sides)
        projection = learner.image_encoder.proj_rep
    else:
        image, text = (
            [tokens @ (maps.weight + part.A @ part.B).t() + part.bias for part in maps.srra]
            for maps in (own.srra_r2vproj, own.srra_r2tproj)
        )
        projection = model.visual.proj + learner.image_encoder.A @ learner.image_encoder.B
    prompts = [template.format(name.replace("_", " ")) for name in names]
    inserted = dict(zip(blocks, text, strict=True))
    texts = F.normalize(naive_deep.encode_texts(model, prompts, inserted=inserted, share=beta), dim=-1)
    out = naive_deep.encode_images(model, images, inserted=dict(zip(blocks, image, strict=True)), share=beta)
    first = F.normalize(out[:, 0] @ model.visual.proj, dim=-1)
    second = F.normalize(out[:, 1:4].mean(dim=1) @ projection, dim=-1)
    scale = model.logit_scale.exp()
    return scale * first @ texts.t(), scale * second @ texts.t(), first, texts


@pytest.mark.parametrize(
    "arguments",
    [{}, {"rep_start": 1}, {"rep_start": 4}, {"rep_end": 2}, {"template": "{} texture."}, {"which": "MMRLPP"}],
    ids=str,
)
def test_losses_and_gradients_are_the_naive_ones(make, images, labels, names, arguments):
    network = make(**arguments).train()
    beta = 0.6 if "which" in arguments else 1.0

    class Bare(MMRL):
        settings = RepresentationConfig(alpha=0.7, reg_weight=0.5)

        def __init__(self):
            self.network = network

        def class_loss(self, logits, labels):
            return F.cross_entropy(logits, labels)

    outputs = network.outputs(images)
    got = Bare().loss(outputs, labels)
    model, template = random_open_clip(), arguments.get("template", TEMPLATE)
    logits, second, first, texts = naive(model, network.learner, images, names, template, beta)
    with torch.no_grad():
        frozen = F.normalize(model.encode_image(images), dim=-1)
        prompts = [template.format(name.replace("_", " ")) for name in names]
        frozen_texts = F.normalize(naive_deep.encode_texts(model, prompts), dim=-1)
    want = {
        "ce": 0.7 * F.cross_entropy(logits, labels),
        "tokens": 0.3 * F.cross_entropy(second, labels),
        "image": 0.5 * (1 - sum(a @ b for a, b in zip(first, frozen, strict=True)) / 6),
        "text": 0.5 * (1 - sum(a @ b for a, b in zip(texts, frozen_texts, strict=True)) / 5),
    }
    torch.testing.assert_close(outputs.logits / 100, logits / 100, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.second / 100, second / 100, rtol=0, atol=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    learnt = list(network.learner.parameters())
    want_grads = torch.autograd.grad(sum(want.values()), learnt, allow_unused=True)
    got_grads = torch.autograd.grad(sum(got.values()), learnt, allow_unused=True)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=2e-3, atol=1e-3)
    both = 0.7 * logits + 0.3 * second
    torch.testing.assert_close(network.eval().both(images)[1], both, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("which", ["MMRL", "MMRLPP"])
def test_new_classes_get_the_class_token_alone(make, images, names, which):
    trained = make(which)
    state, model = trained.learner.state_dict(), random_open_clip()
    beta = 0.6 if which == "MMRLPP" else 1.0

    def check(classnames, both, **arguments):
        other = make(which, classnames=classnames, **arguments)
        other.learner.take(state)
        logits, second, *_ = naive(model, trained.learner, images, classnames, TEMPLATE, beta)
        want = 0.7 * logits + 0.3 * second if both else logits
        torch.testing.assert_close(other.eval().both(images)[1], want, rtol=1e-4, atol=1e-3)
        return other

    check([names[3], names[0]], both=True)
    check(["meadow", names[3]], both=False)
    check(["meadow", names[3]], both=True, heads="both")
    again = check(names, both=False, heads="class")
    again.learner.heads = "auto"
    assert again.learner.uses_both
    again.learner.take({name: value for name, value in state.items() if name != "_extra_state"})  # published: no names
    assert again.learner.uses_both


def test_prompts_share_their_beginning(make, monkeypatch):
    network = make()
    text, seen = network.clip.text, []
    plain = text._plain
    monkeypatch.setattr(
        text, "_plain", lambda state, *rest: (seen.append(state.shared.shape[1]), plain(state, *rest))[1]
    )
    network.compute_text()
    assert seen == [8, 8, 8]  # <start> a photo of a, and three tokens, in blocks 2 to 4


def test_published_names_and_checkpoints(make):
    maps = {
        f"representation_learner.compound_rep_tokens_r2{side}proj.{i}.{name}": shape
        for side, width in (("v", 48), ("t", 32))
        for i in range(3)
        for name, shape in (("weight", (width, 10)), ("bias", (width,)))
    }
    tokens = {"representation_learner.compound_rep_tokens": (3, 10)}
    shared = {
        f"representation_learner.srra_r2{side}proj.{name}": shape
        for side, width in (("v", 48), ("t", 32))
        for name, shape in {
            "weight": (width, 10),
            **{f"srra.{i}.A": (width, 2) for i in range(3)},
            **{f"srra.{i}.B": (2, 10) for i in range(3)},
            **{f"srra.{i}.bias": (width,) for i in range(3)},
        }.items()
    }
    for which, want in (
        ("MMRL", {**tokens, **maps, "image_encoder.proj_rep": (48, 24)}),
        ("MMRLPP", {**tokens, **shared, "image_encoder.A": (48, 5), "image_encoder.B": (5, 24)}),
    ):
        learner = make(which).learner
        assert {name: tuple(p.shape) for name, p in learner.named_parameters()} == want
        state, learnt = naive_deep.published(learner, ("prompt_embeddings", "image_encoder.proj", "text_encoder.x"))
        learner.take(state)
        assert all(torch.equal(p, learnt[name].float()) for name, p in learner.named_parameters())


def test_the_maps_start_alike_and_the_update_at_zero(make_clip, names):
    learner = MMRLLearner(make_clip(), names, RepresentationConfig(**SMALL))
    first, second, *_ = learner.representation_learner.compound_rep_tokens_r2vproj
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
    other = MMRLPPLearner(make_clip(), names, MMRLPPConfig(**{**SMALL, **MORE}))
    own = torch.randn(48, 24)
    assert torch.equal(other.projection(own), own)
    image = other.representation_learner.image()
    assert torch.equal(image[0], image[2])


def test_settings_that_do_not_fit(make, small_run):
    with pytest.raises(ValueError, match="TRAINER.MMRL.REP_START to be at most 4, the encoders' depth, but got 5"):
        make(rep_start=5)
    with pytest.raises(ValueError, match="rep_start 3 but got 2"):
        make(rep_start=3).learner.take(make().learner.state_dict())
    with pytest.raises(ValueError, match="beta 0.5 but got 0.6"):
        make("MMRLPP", beta=0.5).learner.take(make("MMRLPP").learner.state_dict())
    with pytest.raises(ValueError, match="Expected a vision transformer for MMRL but the image encoder is a ResNet"):
        make(kind="resnet")
    with pytest.raises(ValueError, match="REP_END to be a number, at least 3"):
        build_trainer(small_run("mmrl")("MMRL", "TRAINER.MMRL.REP_END", 2))

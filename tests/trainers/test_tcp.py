import open_clip
import pytest
import torch
from naive_text import encode_prompts
from random_clip import random_open_clip
from torch.nn import functional as F

from dassl.engine import build_trainer
from trainers.base import distance_to
from trainers.tcp import TCPClassifier, TCPConfig, TCPLearner

TEMPLATE = "a photo of a {}, a type of place."


@pytest.fixture
def make(make_clip, names):
    def build(kind="vit", classnames=names, rest="{}.", **arguments):
        clip = make_clip(kind)
        torch.manual_seed(3)
        learner = TCPLearner(clip, classnames, TCPConfig(**{"n_ctx": 3, "layer": 3, **arguments}), rest)
        with torch.no_grad():
            learner.ctx.mul_(20)
            for p in learner.meta_net.parameters():
                p.mul_(5)
        return TCPClassifier(clip, classnames, [TEMPLATE], learner)

    return build


def naive_texts(model, learner, names, words="", rest="{}."):
    prompts = [TEMPLATE.format(name.replace("_", " ")) for name in names]
    frozen = F.normalize(model.encode_text(open_clip.tokenize(prompts)), dim=-1).detach()
    first, second = learner.meta_net["linear1"], learner.meta_net["linear2"]
    hidden = frozen @ first.weight.t() + first.bias
    tokens = (hidden / (1 + torch.exp(-1.702 * hidden))) @ second.weight.t() + second.bias
    tokens = tokens.reshape(len(names), len(learner.ctx), -1)
    return encode_prompts(model, learner.ctx, names, words, rest, (learner.layer, tokens)), frozen


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"layer": 1}, {"layer": 99}, {"ctx_init": "a photo of a"}, {"rest": "person doing {}, a type of road."}],
    ids=str,
)
def test_logits_and_gradients_are_the_naive_ones(make, images, labels, names, kind, arguments):
    classifier = make(kind, **arguments).train()
    model, learner = random_open_clip(kind), classifier.learner
    words, rest = arguments.get("ctx_init", ""), arguments.get("rest", "{}.")
    texts, frozen = naive_texts(model, learner, names, words, rest)
    want = model.logit_scale.exp() * F.normalize(model.encode_image(images), dim=-1) @ texts.t()
    outputs = classifier.outputs(images)
    torch.testing.assert_close(outputs.logits / 100, want / 100, rtol=0, atol=1e-5)
    learnt = list(learner.parameters())
    distance = 1 - F.cosine_similarity(texts, frozen, dim=1).mean()
    want_loss = F.cross_entropy(want, labels) + 8 * distance
    got_loss = F.cross_entropy(outputs.logits, labels) + 8 * distance_to(classifier.zeroshot, outputs.texts)
    torch.testing.assert_close(got_loss, want_loss, rtol=1e-4, atol=1e-4)
    want_grads = torch.autograd.grad(want_loss, learnt, allow_unused=True)
    got_grads = torch.autograd.grad(got_loss, learnt, allow_unused=True)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(classifier.eval().both(images)[1], outputs.logits, rtol=1e-5, atol=1e-4)


def test_prompts_share_their_beginning_up_to_the_block(make):
    learner = make(layer=99).learner
    assert learner.layer == 4  # clipped to the encoder's depth
    state = learner.prompts.state(make().clip.text, learner.ctx)
    assert state.shared.shape == (1, 4, 32)  # start and three vectors


def test_published_names_and_sizes(make):
    learner = make().learner
    shapes = {name: tuple(p.shape) for name, p in learner.named_parameters()}
    assert shapes == {
        "ctx": (3, 32),
        "meta_net.linear1.weight": (6, 24),  # 24 / 4
        "meta_net.linear1.bias": (6,),
        "meta_net.linear2.weight": (96, 6),
        "meta_net.linear2.bias": (96,),
    }
    assert set(learner.state_dict()) == {*shapes, "token_prefix", "token_suffix", "_extra_state"}
    state = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    learner.take({**state, "token_prefix": torch.randn(40, 1, 32), "token_suffix": torch.randn(40, 73, 32)})
    assert all(torch.equal(p, state[name].float()) for name, p in learner.named_parameters())


def test_other_classes_and_another_block(make, images):
    trained = make()
    other = make(classnames=["meadow", "sea lake"])
    other.learner.take(trained.learner.state_dict())
    torch.testing.assert_close(
        other.eval().both(images)[1][:, 1], trained.eval().both(images)[1][:, 3], rtol=1e-4, atol=1e-3
    )
    with pytest.raises(ValueError, match="layer 2 but got 3"):
        make(layer=2).learner.take(trained.learner.state_dict())


def test_what_follows_the_vectors(small_run):
    make_cfg = small_run("tcp")
    trainer = build_trainer(make_cfg("TCP", "DATASET.TEMPLATE", "my {}, a type of digit."))
    plain = build_trainer(make_cfg("TCP", out="b"))
    given = build_trainer(make_cfg("TCP", "TRAINER.TCP.REST", "{}, a type of digit.", out="c"))
    length = {t: t.network.learner.prompts.suffix.shape[1] for t in (trainer, plain, given)}
    assert length[trainer] == length[given] == length[plain] + 5  # , a type of digit


def test_rest_without_a_place_for_the_name(small_run):
    with pytest.raises(ValueError, match="Expected TRAINER.TCP.REST to be '' or text with one {} but got 'a pet'"):
        build_trainer(small_run("tcp")("TCP", "TRAINER.TCP.REST", "a pet"))


def test_a_name_that_is_too_long_beside_the_rest(make, names):
    long = " ".join(["cat"] * 70)
    with pytest.raises(ValueError, match=r"at most \d+ tokens beside 3 context vectors and '{}, a type of pet.'"):
        make(classnames=[long, *names[1:]], rest="{}, a type of pet.")

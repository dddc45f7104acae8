import naive_deep
import pytest
import torch
from random_clip import random_open_clip
from torch.nn import functional as F

from dassl.engine import build_trainer
from trainers.base.deep_prompts import DeepPromptClassifier, MappedLearner

TEMPLATE = "a photo of a {}."


@pytest.fixture
def make(make_clip, names):
    def build(classnames=names, n=2, depth=3, words="a photo of a", kind="vit"):
        clip = make_clip(kind)
        torch.manual_seed(3)
        learner = MappedLearner(clip, classnames, n, depth, words, "MaPLe")
        with torch.no_grad():
            for p in learner.parameters():
                p.mul_(5)
        return DeepPromptClassifier(clip, classnames, [TEMPLATE], learner)

    return build


def naive_logits(model, learner, images, names, words):
    own = learner.prompt_learner
    prompts = [f"{words or ' '.join('X' * len(own.ctx))} {name.replace('_', ' ')}." for name in names]
    text = {1: own.ctx, **dict(enumerate(own.compound_prompts_text, start=2))}
    maps = [own.proj, *own.compound_prompt_projections]
    image = {i: t @ m.weight.t() + m.bias for (i, t), m in zip(text.items(), maps, strict=True)}
    texts = naive_deep.encode_texts(model, prompts, own.ctx, {i: t for i, t in text.items() if i > 1})
    return naive_deep.logits(model, naive_deep.image_features(model, images, image), texts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({}, "a photo of a"), ({"depth": 1}, "a photo of a"), ({"depth": 9, "n": 4}, "a photo of a"), ({"n": 3}, "")],
)
def test_logits_and_gradients_are_the_naive_ones(make, images, labels, names, arguments, words):
    classifier = make(words=words, **arguments).train()
    model, learnt = random_open_clip(), list(classifier.learner.parameters())
    want = naive_logits(model, classifier.learner, images, names, words)
    got = classifier.outputs(images).logits
    torch.testing.assert_close(got / 100, want / 100, rtol=0, atol=1e-5)
    want_grads = torch.autograd.grad(F.cross_entropy(want, labels), learnt)
    got_grads = torch.autograd.grad(F.cross_entropy(got, labels), learnt)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(classifier.eval().both(images)[1], got, rtol=1e-5, atol=1e-4)


def test_prompts_share_their_beginning_in_all_blocks(make, monkeypatch):
    classifier = make()
    text, learner = classifier.clip.text, classifier.learner
    assert learner.prompts.state(text, learner.prompt_learner.ctx).shared.shape == (1, 5, 32)  # <start> v v of a
    seen, plain = [], text._plain
    monkeypatch.setattr(
        text, "_plain", lambda state, *rest: (seen.append(state.shared.shape[1]), plain(state, *rest))[1]
    )
    classifier.encode_texts()
    assert seen == [5, 5, 5, 5]


def test_the_first_tokens_start_as_the_words(make):
    clip = make().clip
    ids = clip.text.tokenise(["a photo of a"]).ids
    torch.testing.assert_close(
        5 * clip.text.token_embedding(ids[0, 1:3]).detach(), make().learner.prompt_learner.ctx.data
    )


def test_published_names_and_checkpoints(make):
    learner = make().learner
    shapes = {name: tuple(p.shape) for name, p in learner.named_parameters()}
    assert shapes == {
        "prompt_learner.ctx": (2, 32),
        "prompt_learner.proj.weight": (48, 32),
        "prompt_learner.proj.bias": (48,),
        **{f"prompt_learner.compound_prompts_text.{i}": (2, 32) for i in range(2)},
        **{f"prompt_learner.compound_prompt_projections.{i}.weight": (48, 32) for i in range(2)},
        **{f"prompt_learner.compound_prompt_projections.{i}.bias": (48,) for i in range(2)},
    }
    assert set(learner.state_dict()) == {*shapes, "_extra_state"}
    state, learnt = naive_deep.published(learner)
    learner.take(state)
    assert all(torch.equal(p, learnt[name].float()) for name, p in learner.named_parameters())
    with pytest.raises(ValueError, match="lacks"):
        make(depth=4).learner.take(state)
    with pytest.raises(ValueError, match="lacks .* and has"):
        make(depth=2).learner.take(state)


def test_other_classes_and_other_words(make, images):
    trained = make()
    other = make(classnames=["meadow", "sea lake"])
    other.learner.take(trained.learner.state_dict())
    torch.testing.assert_close(
        other.eval().both(images)[1][:, 1], trained.eval().both(images)[1][:, 3], rtol=1e-4, atol=1e-3
    )
    with pytest.raises(ValueError, match="the prompt context 'an image of' but got 'a photo of a'"):
        make(words="an image of").learner.take(trained.learner.state_dict())


def test_resnets_are_refused_before_clip_is_loaded(small_run, make, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("CLIP was looked up or loaded before the check")

    monkeypatch.setattr("trainers.base.clip_trainer.load_clip", refuse)
    monkeypatch.setattr("trainers.base.clip_trainer.check_backbone", refuse)
    for folder, name in (("maple", "MaPLe"), ("vpt", "VPT"), ("mmrl", "MMRL")):
        for backbone in ("RN50", "open_clip:RN50-quickgelu/cc12m"):
            with pytest.raises(
                ValueError, match=f"to be a vision transformer for {name}, .* got the ResNet '{backbone}'"
            ):
                build_trainer(small_run(folder)(name, "MODEL.BACKBONE.NAME", backbone))
    with pytest.raises(ValueError, match="Expected a vision transformer for MaPLe but the image encoder is a ResNet"):
        make(kind="resnet")


def test_more_tokens_than_words(small_run):
    with pytest.raises(
        ValueError, match=r"MAPLE.N_CTX to be at most 4, the number of tokens of .* but got 5; with CTX_I"
    ):
        build_trainer(small_run("maple")("MaPLe", "TRAINER.MAPLE.N_CTX", 5))
    trainer = build_trainer(small_run("maple")("MaPLe", "TRAINER.MAPLE.N_CTX", 5, "TRAINER.MAPLE.CTX_INIT", ""))
    assert trainer.network.learner.prompt_learner.ctx.shape == (5, 64)


def test_a_name_that_is_too_long_beside_words(make, names):
    with pytest.raises(ValueError, match="at most 70 tokens beside 4 context vectors and a full stop"):
        make(classnames=[" ".join(["cat"] * 71), *names[1:]])

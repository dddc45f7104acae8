import open_clip
import pytest
import torch
from naive_text import encode_embedded
from random_clip import random_open_clip
from torch.nn import functional as F

from trainers.base import PromptClassifier, class_rows
from trainers.clip import CLIP, zeroshot_weights
from trainers.coop import CoOpConfig, build_learner
from trainers.modules.context_prompts import ContextPrompts, word_vectors

TEMPLATE = "a photo of a {}."


def naive_logits(model, learner, images, names, position, words=""):
    """Published CoOp in plain tensors: all 77 tokens, no sharing."""
    n = learner.ctx.shape[-2]
    names = [name.replace("_", " ") for name in names]
    ids = open_clip.tokenize([f"{words or ' '.join('X' * n)} {name}." for name in names])
    embedded = model.token_embedding(ids)
    rows = []
    for i, name in enumerate(names):
        ctx = learner.ctx if learner.ctx.ndim == 2 else learner.ctx[i]
        size = int(open_clip.tokenize([name]).argmax()) - 1
        start, after = embedded[i, :1], embedded[i, 1 + n :]
        if position == "end":
            parts = [start, ctx, after]
        elif position == "middle":
            parts = [start, ctx[: n // 2], after[:size], ctx[n // 2 :], after[size:]]
        else:
            parts = [start, after[:size], ctx, after[size:]]
        rows.append(torch.cat(parts))
    text = encode_embedded(model, torch.stack(rows), ids)
    image = F.normalize(model.encode_image(images), dim=-1)
    return model.logit_scale.exp() * image @ text.t()


@pytest.fixture
def make(make_clip, names):
    def build(kind="vit", classnames=names, clip=None, **arguments):
        clip = clip or make_clip(kind)
        torch.manual_seed(3)
        learner = build_learner(clip, classnames, CoOpConfig(**{"n_ctx": 5, **arguments}))
        return PromptClassifier(clip, classnames, [TEMPLATE], learner)

    return build


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("csc", [False, True])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_logits_and_gradients_are_the_naive_ones(make, images, labels, names, kind, csc, position):
    classifier = make(kind, csc=csc, class_token_position=position)
    model, learner = random_open_clip(kind), classifier.learner
    with torch.no_grad():
        learner.ctx.mul_(20)  # the usual start is too timid to matter
    classifier.train()
    want = naive_logits(model, learner, images, names, position)
    got = classifier(images)
    torch.testing.assert_close(got / 100, want / 100, rtol=0, atol=1e-5)
    (want_grad,) = torch.autograd.grad(F.cross_entropy(want, labels), learner.ctx)
    (got_grad,) = torch.autograd.grad(F.cross_entropy(got, labels), learner.ctx)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-3, atol=1e-4)
    classifier.eval()
    zero_shot, evaluated = classifier.both(images)
    torch.testing.assert_close(evaluated, got)
    weights = zeroshot_weights(classifier.clip, names, [TEMPLATE])
    torch.testing.assert_close(
        zero_shot, 100.0 * F.normalize(classifier.clip.encode_image(images), dim=-1) @ weights.t(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_words(make, images, names, position):
    classifier = make(ctx_init="a_photo of a", class_token_position=position)
    assert classifier.learner.ctx.shape == (4, 32)
    want = naive_logits(random_open_clip(), classifier.learner, images, names, position, "a photo of a")
    torch.testing.assert_close(classifier(images) / 100, want / 100, rtol=0, atol=1e-5)
    if position == "end":  # nothing learnt yet: the plain prompt
        plain = F.normalize(classifier.clip.encode_text([TEMPLATE.format(n.replace("_", " ")) for n in names]), dim=-1)
        torch.testing.assert_close(classifier.text_features(), plain, rtol=0, atol=1e-5)


def test_words_leave_one_context_for_all(make, caplog):
    assert make(ctx_init="a photo of a", csc=True).learner.ctx.ndim == 2
    assert "CSC is ignored" in caplog.text


def test_only_the_context_is_learnt(make):
    learner = make().learner
    assert [name for name, _ in learner.named_parameters()] == ["ctx"]
    assert set(learner.state_dict()) == {"ctx", "token_prefix", "token_suffix", "_extra_state"}


def test_too_many_vectors(make):
    with pytest.raises(ValueError, match="at most 74"):
        make(n_ctx=75)


def test_text_features_are_kept_until_something_is_learnt(make):
    classifier = make().eval()
    first = classifier.text_features()
    assert classifier.text_features() is first
    with torch.no_grad():
        classifier.learner.ctx.add_(1)
    assert not torch.equal(classifier.text_features(), first)


class TestLoading:
    def test_published_checkpoint(self, make):
        """Context in half precision, full-length token buffers of other classes, no record."""
        state = {
            "ctx": torch.randn(5, 32).half(),
            "token_prefix": torch.randn(40, 1, 32),
            "token_suffix": torch.randn(40, 71, 32),
        }
        learner = make().learner
        before = learner.token_suffix.clone()
        learner.take(state)
        assert torch.equal(learner.ctx, state["ctx"].float())
        assert torch.equal(learner.token_suffix, before)

    def test_other_classes(self, make, images):
        trained = make()
        other = make(classnames=["meadow", "sea lake"])
        other.learner.take(trained.learner.state_dict())
        assert torch.equal(other.learner.ctx, trained.learner.ctx)
        torch.testing.assert_close(
            other.eval().both(images)[1][:, 1], trained.eval().both(images)[1][:, 3], rtol=1e-4, atol=1e-3
        )

    def test_a_context_for_each_class(self, make, names, images):
        trained = make(csc=True)
        state = trained.learner.state_dict()
        part = make(csc=True, classnames=[names[3], names[0]])
        part.learner.take(state)
        torch.testing.assert_close(
            part.eval().both(images)[1], trained.eval().both(images)[1][:, [3, 0]], rtol=1e-4, atol=1e-3
        )
        with pytest.raises(ValueError, match="'meadow'"):
            make(csc=True, classnames=[names[0], "meadow"]).learner.take(state)
        with pytest.raises(ValueError, match=r"shape \(5, 32\) but got \(5, 5, 32\)"):
            make().learner.take(state)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"n_ctx": 4}, r"ctx to have shape \(4, 32\) but got \(5, 32\)"),
            ({"class_token_position": "front"}, "position 'front' but got 'end'"),
        ],
    )
    def test_does_not_fit(self, make, change, message):
        with pytest.raises(ValueError, match=message):
            make(**change).learner.take(make().learner.state_dict())

    def test_other_weights(self, make):
        other = CLIP(random_open_clip(seed=1), name="random-vit")
        with pytest.raises(ValueError, match="CLIP weights"):
            make(clip=other).learner.take(make().learner.state_dict())

    def test_something_else(self, make):
        with pytest.raises(ValueError, match=r"lacks \['ctx'\]"):
            make().learner.take({"weight": torch.zeros(1)})


def test_class_rows():
    assert class_rows(["a", "a"], ["a", "a"], None) == [0, 1]
    assert class_rows(["a", "c"], ["a", "b", "a", "c"], [2, 3]) == [2, 3]
    assert class_rows(["c", "b"], ["a", "b", "c"], None) == [2, 1]
    with pytest.raises(ValueError, match="'a'"):
        class_rows(["a"], ["a", "b", "a"], None)


def test_word_vectors(make_clip):
    clip = make_clip()
    assert word_vectors(clip.text, "a photo").shape == (2, 32)
    assert not word_vectors(clip.text, "a photo").requires_grad


def test_unknown_position(make_clip, names):
    with pytest.raises(ValueError, match="end, middle, front"):
        ContextPrompts(make_clip().text, names, 4, position="back")


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_a_class_name_may_fill_the_context_and_no_more(make, images, names, position):
    n_ctx = 16
    name = " ".join(["cat"] * (77 - 2 - n_ctx - 1))  # start, end, vectors, full stop
    full = make(classnames=[name, *names[1:]], n_ctx=n_ctx, class_token_position=position)
    want = naive_logits(random_open_clip(), full.learner, images, [name, *names[1:]], position)
    torch.testing.assert_close(full(images) / 100, want / 100, rtol=0, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"at most 58 tokens beside 16 context vectors .* but 1 are longer, .* with 59"
    ):
        make(classnames=[f"{name} cat", *names[1:]], n_ctx=n_ctx, class_token_position=position)
    with pytest.raises(ValueError, match="with 200"):
        make(classnames=[" ".join(["cat"] * 200), *names[1:]], n_ctx=n_ctx, class_token_position=position)

import open_clip
import pytest
import torch
from naive_text import encode_prompts
from random_clip import random_open_clip
from torch.nn import functional as F

from dassl.engine import build_trainer
from trainers.base import PromptClassifier, distance_to, initial_context
from trainers.kgcoop import KgCoOpLearner

TEMPLATE = "an image of a {}."


@pytest.fixture
def make(make_clip, names):
    def build(kind="vit", classnames=names, words="a photo of a"):
        clip = make_clip(kind)
        torch.manual_seed(3)
        learner = KgCoOpLearner(clip, classnames, *initial_context(clip, 5, words))
        return PromptClassifier(clip, classnames, [TEMPLATE], learner)

    return build


@pytest.mark.parametrize("words", ["", "a photo of a"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_loss_and_gradient_are_the_naive_ones(make, images, labels, names, kind, words):
    classifier = make(kind, words=words).train()
    model, ctx = random_open_clip(kind), classifier.learner.ctx
    with torch.no_grad():
        ctx.add_(torch.randn_like(ctx))
    texts = encode_prompts(model, ctx, names, words)
    prompts = [TEMPLATE.format(name.replace("_", " ")) for name in names]
    frozen = model.encode_text(open_clip.tokenize(prompts))
    cosines = [F.cosine_similarity(text, other, dim=0) for text, other in zip(texts, frozen, strict=True)]
    logits = model.logit_scale.exp() * F.normalize(model.encode_image(images), dim=-1) @ texts.t()
    want = F.cross_entropy(logits, labels) + 8 * (1 - sum(cosines) / len(names))
    outputs = classifier.outputs(images)
    torch.testing.assert_close(outputs.logits / 100, logits / 100, rtol=0, atol=1e-5)
    got = F.cross_entropy(outputs.logits, labels) + 8 * distance_to(classifier.zeroshot, outputs.texts)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    (want_grad,), (got_grad,) = (torch.autograd.grad(value, ctx) for value in (want, got))
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(classifier.eval().both(images)[1], outputs.logits, rtol=1e-5, atol=1e-4)


def test_a_step_adds_the_distance_w_times(small_run):
    cfg = small_run("kgcoop", "DATALOADER.TRAIN_X.BATCH_SIZE", 5, "TRAINER.KGCOOP.W", 3.0)("KgCoOp")
    trainer = build_trainer(cfg)
    with torch.no_grad():
        trainer.network.learner.ctx.add_(0.1)
        texts, zeroshot = trainer.network.compute_text(), trainer.network.zeroshot
    distance = 1 - sum(float(t @ w) for t, w in zip(texts, zeroshot, strict=True)) / len(zeroshot)
    trainer.set_model_mode("train")
    trainer.num_batches = len(trainer.train_loader_x)
    summary = trainer.forward_backward(next(iter(trainer.train_loader_x)))
    assert summary["kg"] == pytest.approx(3 * distance, abs=1e-4) and distance > 0.01
    assert summary["loss"] == pytest.approx(summary["ce"] + summary["kg"], rel=1e-6)


def test_a_published_checkpoint(make):
    """Half precision, entries that nothing uses, full-length token buffers of other classes, no record."""
    learner = make().learner
    state = {
        "ctx": torch.randn(4, 32).half(),
        "bias_vectors": torch.randn(1, 512).half(),
        "meta_net.linear1.weight": torch.randn(512, 512).half(),
        "meta_net.linear1.bias": torch.randn(512).half(),
        "token_prefix": torch.randn(40, 1, 32),
        "token_suffix": torch.randn(40, 72, 32),
    }
    learner.take(state)
    assert torch.equal(learner.ctx, state["ctx"].float())


def test_other_classes(make, images):
    trained = make()
    with torch.no_grad():
        trained.learner.ctx.add_(0.3)
    other = make(classnames=["meadow", "sea lake"])
    other.learner.take(trained.learner.state_dict())
    torch.testing.assert_close(
        other.eval().both(images)[1][:, 1], trained.eval().both(images)[1][:, 3], rtol=1e-4, atol=1e-3
    )

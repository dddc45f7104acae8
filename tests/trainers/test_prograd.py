import pytest
import torch
from naive_text import encode_prompts
from random_clip import random_open_clip
from torch.nn import functional as F

from dassl.engine import build_trainer
from trainers.base import PromptClassifier, PromptLearner
from trainers.modules.context_prompts import word_vectors
from trainers.prograd import padded_context, without_conflict, words_before_the_name


@pytest.fixture
def make_cfg(small_run):
    return small_run("prograd", "DATALOADER.TRAIN_X.BATCH_SIZE", 5, "OPTIM.MAX_EPOCH", 1)


@pytest.mark.parametrize("share", [1.0, 0.8, 0.0])
def test_what_conflicts_is_taken_away(share):
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(20):
        g, h = torch.randn(2, 3, 4, generator=generator)
        product = sum(a * b for a, b in zip(g.flatten().tolist(), h.flatten().tolist(), strict=True))
        want = g - share * product / float(h.norm()) ** 2 * h if product < 0 else g
        got = without_conflict(g, h, share)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        if product < 0 and share == 1:
            assert abs(float((got * h).sum())) < 1e-5
        seen.add(product < 0)
    assert seen == {True, False}
    assert torch.equal(without_conflict(g, torch.zeros(3, 4)), g)  # h says nothing


def naive_gradient(trainer, batch, labels, t, share):
    """The gradient of a step: cross-entropy's, and the divergence's with its entropy, by autograd on plain tensors."""
    network = trainer.network
    with torch.no_grad():
        features = F.normalize(network.clip.encode_image(batch["img"]), dim=-1)
    scale = network.clip.logit_scale
    logits = scale * features @ F.normalize(network.encode_texts(), dim=-1).t()
    teacher = torch.softmax(scale * features @ network.zeroshot.t() / t, dim=1)
    divergence = F.kl_div(torch.log_softmax(logits / t, dim=1), teacher, reduction="batchmean") * t * t
    (h,) = torch.autograd.grad(divergence, network.learner.ctx, retain_graph=True)
    (g,) = torch.autograd.grad(F.cross_entropy(logits, labels), network.learner.ctx)
    product = float((g * h).sum())
    return (g - share * product / float(h.norm()) ** 2 * h if product < 0 else g), product


@pytest.mark.parametrize("t, share", [(1.0, 1.0), (2.0, 0.8)])
def test_the_gradient_of_a_step(make, t, share):
    trainer = make("ProGrad", "TRAINER.PROGRAD.T", t, "TRAINER.PROGRAD.LAMBDA", share)
    trainer.set_model_mode("train")
    trainer.num_batches = len(trainer.train_loader_x)
    learner, signs = trainer.network.learner, set()
    with torch.no_grad():
        learner.ctx.add_(0.3 * torch.randn_like(learner.ctx))
    batch = next(iter(trainer.train_loader_x))
    with torch.no_grad():
        zeroshot = trainer.network.both(batch["img"])[0]
    for labels in (zeroshot.argmin(dim=1), zeroshot.argmax(dim=1)):  # against zero-shot CLIP, and with it
        want, product = naive_gradient(trainer, batch, labels, t, share)
        trainer.forward_backward({**batch, "label": labels})
        torch.testing.assert_close(learner.ctx.grad, want, rtol=1e-3, atol=1e-5)
        signs.add(product < 0)
    assert signs == {True, False}


@pytest.mark.parametrize("prec", ["bf16", "fp16", "amp"])
def test_a_step_in_reduced_precision(make, prec):
    trainer = make("ProGrad", "TRAINER.PROGRAD.PREC", prec)
    before = trainer.network.learner.ctx.detach().clone()
    trainer.train()
    after = trainer.network.learner.ctx
    assert torch.isfinite(after).all() and not torch.equal(before, after)


def test_the_start_is_zeros_and_the_template_s_words(make, make_clip, names, images):
    trainer = make("ProGrad", "TRAINER.PROGRAD.N_CTX", 16)
    text, ctx = trainer.network.clip.text, trainer.network.learner.ctx
    words = word_vectors(text, "a photo of the number")
    assert ctx.shape == (16, text.width) and not ctx[:11].any() and torch.equal(ctx[11:], words)
    clip = make_clip()
    context, words = padded_context(clip, 6, "a photo of a")
    assert words == "X X a photo of a"
    classifier = PromptClassifier(clip, names, ["{}"], PromptLearner(clip, names, context, words)).eval()
    model = random_open_clip()
    texts = encode_prompts(model, context, names, words)
    want = F.normalize(model.encode_image(images), dim=-1) @ texts.t()
    torch.testing.assert_close(classifier.both(images)[1] / clip.logit_scale, want, rtol=0, atol=1e-5)
    at_random = make("ProGrad", "TRAINER.PROGRAD.FROM_TEMPLATE", False, "TRAINER.PROGRAD.N_CTX", 3, out="b")
    assert at_random.network.learner.ctx.shape == (3, text.width) and at_random.network.learner.ctx.all()
    nothing_before = make("ProGrad", "DATASET.TEMPLATE", "{} texture.", out="c")
    assert nothing_before.network.learner.ctx.all()


def test_words_before_the_name():
    assert words_before_the_name("a photo of a {}, a type of pet.") == "a photo of a"
    assert words_before_the_name("{} texture.") == ""


def test_too_few_vectors(make_cfg):
    with pytest.raises(ValueError, match=r"Expected TRAINER.PROGRAD.N_CTX to be at least 5, .* but got 4"):
        build_trainer(make_cfg("ProGrad", "TRAINER.PROGRAD.N_CTX", 4))

"""2SFS: LayerNorms of both encoders first, then a linear classifier."""

import copy
import math

import open_clip
import pytest
import torch
from random_clip import random_open_clip
from torch.nn import functional as F

from dassl.engine import build_trainer
from trainers.features.kept_views import ViewLoader
from trainers.twostagefs import TwoStageClassifier, TwoStageLearner

TEMPLATE = "a blurry photo of a {}."


@pytest.fixture
def make(make_clip, names):
    def build(kind="vit", classnames=names, every=False, scatter=True):
        clip = make_clip(kind)
        learner = TwoStageLearner(clip, classnames, every)
        if scatter:
            torch.manual_seed(3)
            with torch.no_grad():
                for p in learner.parameters():
                    p.add_(0.2 * torch.randn(p.shape))
        return TwoStageClassifier(clip, classnames, [TEMPLATE], learner, every)

    return build


def naive(learner, images, names):
    """CLIP's own forward with the learnt gains and biases in its LayerNorms -> image and text features, normalized."""
    model = random_open_clip()
    model.train()  # else open_clip's attention takes a path without gradients
    weights = dict(model.named_parameters())
    for part, prefix, ends in ((learner.visual, "visual.", ("ln_pre", "ln_post")), (learner.text, "", ("ln_final",))):
        for name, p in part.named_parameters():
            number, which, what = name.split(".")
            block = "" if which in ends else f"transformer.resblocks.{int(number) - 1}."
            assert f"{prefix}{block}{which}.{what}" in weights
            weights[f"{prefix}{block}{which}.{what}"] = p
    prompts = open_clip.tokenize([TEMPLATE.format(name.replace("_", " ")) for name in names])
    image, text, _ = torch.func.functional_call(model, weights, (images, prompts))
    return image, text


def check_gradients(got, want, parameters):
    parameters = list(parameters)
    got, want = (torch.autograd.grad(loss, parameters) for loss in (got, want))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("every", [False, True])
def test_first_stage_is_the_naive_one(make, images, labels, names, every):
    classifier = make(every=every).train()
    image, text = naive(classifier.learner, images, names)
    want, got = 100 * image @ text.t(), classifier(images)
    torch.testing.assert_close(got / 100, want / 100, rtol=0, atol=1e-5)
    norms = [*classifier.learner.visual.parameters(), *classifier.learner.text.parameters()]
    assert len(norms) == 2 * 2 * (4 + 4) + (6 if every else 0)
    check_gradients(F.cross_entropy(got, labels), F.cross_entropy(want, labels), norms)
    torch.testing.assert_close(classifier.eval().both(images)[1], got, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("every", [False, True])
def test_second_stage_is_the_naive_one(make, images, labels, names, every):
    classifier = make(every=every).train()
    image, text = (x.detach() for x in naive(classifier.learner, images, names))
    classifier.begin_second()
    torch.testing.assert_close(classifier.learner.classifier.detach(), text, rtol=0, atol=1e-5)
    with torch.no_grad():
        classifier.learner.classifier.mul_(1.7).add_(0.1 * torch.randn(text.shape))
    weights = classifier.learner.classifier.detach().clone().requires_grad_()
    want, got = 100 * image @ F.normalize(weights, dim=-1).t(), classifier(images)
    torch.testing.assert_close(got / 100, want / 100, rtol=0, atol=1e-5)
    F.cross_entropy(want, labels).backward()
    F.cross_entropy(got, labels).backward()
    torch.testing.assert_close(classifier.learner.classifier.grad, weights.grad, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for name, p in classifier.learner.named_parameters() if name != "classifier")


@pytest.mark.parametrize("every", [False, True])
def test_at_the_start_it_is_clip(make, images, every):
    zero_shot, logits = make(scatter=False, every=every).eval().both(images)
    torch.testing.assert_close(logits, zero_shot, rtol=1e-5, atol=1e-4)


def test_mixed_class_lists_get_rows_or_texts(make, images, names):
    trained = make()
    image, text = naive(trained.learner, images, names)
    before = trained.learner.state_dict()
    trained.begin_second()
    with torch.no_grad():
        trained.learner.classifier.add_(0.3 * torch.randn(text.shape))
    state, rows = copy.deepcopy(trained.learner.state_dict()), F.normalize(trained.learner.classifier, dim=-1)

    def logits(classnames, state, indices=None):
        other = make(classnames=classnames, scatter=False)
        other.learner.take(state, indices)
        return other.eval().both(images)[1]

    def check(got, classes):
        torch.testing.assert_close(got / 100, image @ torch.stack(classes).t(), rtol=0, atol=1e-5)

    mixed = ["meadow", names[3], "road", names[0]]
    new = naive(trained.learner, images, mixed)[1]
    check(logits(mixed, state), [new[0], rows[3], new[2], rows[0]])
    check(logits([names[2], names[4]], state), [rows[2], rows[4]])
    check(logits(mixed, before), list(new))  # saved in the first stage: texts for all
    twice = make(classnames=["river", "river", "lake"])
    twice.begin_second()
    with torch.no_grad():
        twice.learner.classifier.add_(torch.randn(3, 24))
    own = F.normalize(twice.learner.classifier, dim=-1)
    state = twice.learner.state_dict()
    image, text = naive(twice.learner, images, ["river"])
    check(logits(["lake", "river"], state, [2, 1]), [own[2], own[1]])
    check(logits(["lake", "river"], state), [own[2], text[0]])  # its name alone does not tell which river it is


def test_a_checkpoint_of_other_norms_or_shapes(make, names):
    with pytest.raises(ValueError, match=r"it lacks .*text\.5\.ln_final"):
        make(every=True).learner.take(make().learner.state_dict())
    state = make().learner.state_dict()
    state["classifier"] = torch.zeros(4, 24)
    with pytest.raises(ValueError, match=r"classifier to have shape \(5, 24\) but got \(4, 24\)"):
        make().learner.take(state)
    with pytest.raises(ValueError, match="vision transformer for TwoStageFS"):
        make("resnet")


def test_a_resnet_is_refused_before_weights_are_loaded(small_run, monkeypatch):
    monkeypatch.setattr("trainers.base.clip_trainer.load_clip", None)
    with pytest.raises(ValueError, match="vision transformer for TwoStageFS, which learns the LayerNorms"):
        build_trainer(small_run("twostage")("TwoStageFS", "MODEL.BACKBONE.NAME", "RN50"))


STEPS = ("TRAINER.TWOSTAGEFS.N_ITERS", 6, "DATALOADER.TRAIN_X.BATCH_SIZE", 8, "OPTIM.LR", 2e-3)


@pytest.fixture
def run(small_run):
    """Train, and note for each step its rate and the names of what has gradients; `stop` ends the run behind a step."""

    def train(*pairs, out="run", stop=None):
        trainer = build_trainer(small_run("twostage", *STEPS)("TwoStageFS", *pairs, out=out))
        steps, update = [], trainer.model_update

        def noted(*args):
            moved = {n.partition(".")[0] for n, p in trainer.network.learner.named_parameters() if p.grad is not None}
            steps.append((trainer.get_current_lr(), moved))
            made = update(*args)
            if len(steps) == stop:
                raise KeyboardInterrupt
            return made

        trainer.model_update = noted
        try:
            trainer.train()
        except KeyboardInterrupt:
            assert stop
        return trainer, steps

    return train


def test_steps_of_both_stages(run):
    """Twelve steps (6 x 2 shots): seven and five, each stage with a cosine of its own, from a new epoch on."""
    trainer, steps = run()
    assert len(trainer.train_loader_x) == 3  # twenty images
    assert trainer.stages == (7, 5) and trainer.max_epoch == 3 + 2
    cosine = [1e-6 + (2e-3 - 1e-6) * (1 + math.cos(math.pi * t / n)) / 2 for n in (7, 5) for t in range(n)]
    assert [rate for rate, _ in steps] == pytest.approx(cosine)
    assert [moved for _, moved in steps] == [{"visual", "text"}] * 7 + [{"classifier"}] * 5
    (optimizer,) = trainer._optims.values()
    assert {int(entry["step"]) for entry in optimizer.state.values()} == {7, 5}


def test_shares_of_the_stages(run):
    trainer, steps = run("TRAINER.TWOSTAGEFS.FIRST_SHARE", 1.0)
    assert trainer.stages == (12, 0) and not trainer.network.learner.second
    assert all(moved == {"visual", "text"} for _, moved in steps)
    trainer, steps = run("TRAINER.TWOSTAGEFS.FIRST_SHARE", 0.0, out="other")
    assert trainer.stages == (0, 12) and all(moved == {"classifier"} for _, moved in steps)


@pytest.mark.parametrize("views", [0, 2])
@pytest.mark.parametrize("stop", [5, 7, 9])
def test_a_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(run, views, stop):
    often = ("TRAIN.CHECKPOINT_STEPS", 1, "INPUT.VIEWS", views)
    whole, _ = run(*often, out="whole")
    run(*often, out="half", stop=stop)
    torch.manual_seed(5)
    again, steps = run(*often, out="half")
    assert len(steps) in (12 - stop, 13 - stop)
    for name, value in whole.network.learner.state_dict().items():
        assert torch.equal(again.network.learner.state_dict()[name], value), name


def test_in_the_second_stage_kept_views_are_features(run, monkeypatch):
    kept, release = [], ViewLoader.close

    def noted(loader):
        if hasattr(loader, "store"):
            kept.append([None if part is None else part.ndim for part in (loader.store.features, loader.store.hidden)])
        release(loader)

    monkeypatch.setattr(ViewLoader, "close", noted)
    run("INPUT.VIEWS", 1)
    assert kept == [[None, 3], [2, None]]  # what enters the first block, then features

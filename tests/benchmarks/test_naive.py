"""The computation as published is the oracle of the accelerated one: same losses, gradients and logits."""

import pytest
import torch

from benchmarks.measure import Stopwatch
from benchmarks.naive import Naive
from benchmarks.steps import FreshStep, Learner, NaiveStep, ViewsStep, gradients
from benchmarks.subject import build_network, class_names


def run(step, images, labels):
    step.prepare(images)
    with step.learner.taken_back():
        loss = step.step(labels, Stopwatch(labels.device))
    return loss, gradients(step, labels)


@pytest.fixture
def as_published(network, batch):
    return run(NaiveStep(Naive(network), Learner(network)), *batch)


@pytest.mark.parametrize("kind", [FreshStep, ViewsStep])
def test_accelerated_steps_have_its_loss_and_gradients(network, batch, as_published, kind):
    loss, found = run(kind(network, Learner(network)), *batch)
    wanted_loss, wanted = as_published
    assert loss == pytest.approx(wanted_loss, abs=1e-5)
    for (name, _), ours, theirs in zip(network.learner.named_parameters(), found, wanted, strict=True):
        assert theirs.abs().max() > 0, name
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name


@pytest.mark.parametrize("options", [{"text_chunk": 3}, {"checkpointing": True}])
def test_so_do_the_options_that_save_memory(toy_clip, network, batch, as_published, options):
    other = build_network(toy_clip, 7, scale=0.5, **options)
    other.learner.load_state_dict(network.learner.state_dict())
    loss, found = run(FreshStep(other, Learner(other)), *batch)
    assert loss == pytest.approx(as_published[0], abs=1e-5)
    for ours, theirs in zip(found, as_published[1], strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize(("passes", "chunk"), [(2, 0), (3, 3), (3, 7)])
def test_neither_chunks_of_classes_nor_two_passes_change_it(network, batch, as_published, passes, chunk):
    loss, found = run(NaiveStep(Naive(network, passes), Learner(network), chunk), *batch)
    assert loss == pytest.approx(as_published[0], abs=1e-6)
    for ours, theirs in zip(found, as_published[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_evaluation(network, batch):
    images, _ = batch
    network.eval()
    naive, ours = Naive(network).evaluate(images), network.heads(images)
    assert list(naive) == list(ours)
    for head in naive:
        torch.testing.assert_close(ours[head], naive[head], rtol=1e-5, atol=1e-3)


def test_a_step_can_be_taken_back(network, batch):
    learner = Learner(network)
    step = FreshStep(network, learner)
    step.prepare(batch[0])
    before = [p.clone() for p in learner.parameters]
    with learner.taken_back():
        first = step.step(batch[1], Stopwatch(batch[1].device))
        assert any(not torch.equal(p, q) for p, q in zip(learner.parameters, before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(learner.parameters, before, strict=True))
    assert step.step(batch[1], Stopwatch(batch[1].device)) == first
    assert step.step(batch[1], Stopwatch(batch[1].device)) != first


@pytest.mark.parametrize(("count", "length"), [(2, 10), (1000, 13), (30, 19)])
def test_prompts_have_the_length_asked_for(toy_clip, count, length):
    names = class_names(count, length)
    tokens = toy_clip.text.tokenise([f"a photo of a {name}." for name in names])
    assert len(set(names)) == count
    assert set(tokens.eot.tolist()) == {length - 1}
    assert tokens.shared == 5


@pytest.mark.parametrize("arguments", [(1, 13), (1001, 13), (10, 9), (10, 20)])
def test_prompts_that_cannot_be_made(arguments):
    with pytest.raises(ValueError, match="Expected"):
        class_names(*arguments)

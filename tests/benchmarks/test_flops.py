"""Counted FLOPs against torch's own counter, on the computations themselves."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import flops
from benchmarks.naive import Naive
from benchmarks.steps import FreshStep, Learner, NaiveStep, ViewsStep
from benchmarks.subject import build_network, make_batch


def counted(function) -> int:
    """Attention by its formula, so that the counter sees every product of it, and none that a kernel repeats."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("passes", [2, 3])
def test_step_as_published(network, batch, passes):
    step = NaiveStep(Naive(network, passes), Learner(network))
    found = counted(lambda: step.loss(batch[1], batch[0]).backward())
    assert found == flops.total(flops.naive_step(flops.sizes_of(network, 3), passes))


@pytest.mark.parametrize(("start", "end"), [(1, 12), (2, 12), (4, 12)])
def test_accelerated_steps(toy_clip, start, end):
    network = build_network(toy_clip, 7, start=start, end=end)
    images, labels = make_batch(network, 3, seed=1)
    network.eval().text_features()  # the constants of the class list
    network.train()
    sizes, learner = flops.sizes_of(network, 3), Learner(network)
    for kind, count in ((FreshStep, flops.fresh_step), (ViewsStep, flops.views_step)):
        step = kind(network, learner)
        step.prepare(images)
        found = counted(lambda step=step: step.loss(labels, **step.inputs).backward())
        assert found == flops.total(count(sizes))


def test_parts(network, batch):
    network.eval().text_features()
    network.train()
    sizes, cma, visual = flops.sizes_of(network, 3), network.learner.cma, network.clip.visual
    parts = flops.by_part(flops.fresh_step(sizes))
    assert list(parts) == ["image prefix", "plain suffix", "adapted suffix forward", "adapted suffix backward",
                           "text suffix forward", "text suffix backward", "heads"]  # fmt: skip
    features = []
    assert counted(lambda: features.append(network.text_features())) == parts["text suffix forward"]
    assert counted(lambda: features[0].sum().backward()) == parts["text suffix backward"]
    with torch.no_grad():
        whole = counted(lambda: visual(batch[0]))
    assert whole == parts["image prefix"] + parts["plain suffix"]
    hidden = visual.prefix(batch[0], 1)
    assert hidden.shape[1] == sizes.tokens
    forward = counted(lambda: features.append(visual.suffix(hidden, 2, [cma.visual_edit])))
    first = flops.by_part(flops.views_step(sizes))["image prefix"]  # the first adapted block without its adapter
    assert forward == first + parts["adapted suffix forward"]
    assert counted(lambda: features[1].sum().backward()) == parts["adapted suffix backward"]


def test_evaluation(network):
    network.eval()
    sizes, naive = flops.sizes_of(network, 3), Naive(network)
    batches = [make_batch(network, size, seed=1)[0] for size in (3, 2)]
    assert counted(lambda: [naive.evaluate(x) for x in batches]) == flops.total(flops.naive_eval(sizes, 5))
    network.text_features()
    with torch.no_grad():
        next(network.learner.cma.parameters()).add_(0.0)  # the text is encoded again, its constants are there
        assert counted(lambda: [network(x) for x in batches]) == flops.total(flops.our_eval(sizes, 5))
        kept = network.frozen_part(batches[0])
        found = counted(lambda: network(batches[0], features=kept.features))
        text = flops.by_part(flops.our_eval(sizes, 3))["text suffix forward"]
        assert found == flops.total(flops.our_eval(sizes, 3, plain=False)) - text
        found = counted(lambda: network(features=kept.features, hidden=kept.hidden))
        assert found == flops.total(flops.our_eval(sizes, 3, prefix=False, plain=False)) - text


def test_what_the_ratio_can_be_at_full_size():
    """The floors that docs/PERFORMANCE.md speaks of, to one decimal."""
    sizes = flops.Sizes(
        flops.Tower(12, 768, 12, 3072), flops.Tower(12, 512, 8, 2048), 197, 768, 512, 16, 100, length=13, shared=5
    )
    for classes, fresh, views in ((100, 2.5, 4.3), (1000, 6.6, 9.1)):
        s = replace(sizes, classes=classes)
        naive = flops.total(flops.naive_step(s))
        assert round(naive / flops.total(flops.fresh_step(s)), 1) == fresh
        assert round(naive / flops.total(flops.views_step(s)), 1) == views


def test_prompts_of_several_lengths_are_refused(toy_clip):
    network = build_network(toy_clip, 2)
    network.classnames = ["dog", "small red dog"]
    with pytest.raises(ValueError, match="one length"):
        flops.sizes_of(network, 1)

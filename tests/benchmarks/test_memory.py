"""The memory counters: a case done by hand, tensors without data, and growth with the number of classes."""

import gc

import pytest
import torch

from benchmarks.memory import LiveTensors, SavedTensors, constants, count_step, storage_bytes
from benchmarks.naive import Naive
from benchmarks.steps import FreshStep, Learner, NaiveStep
from benchmarks.subject import build_network, make_batch


def test_saved_tensors_by_hand():
    x, w = torch.randn(10, 4), torch.randn(4, 3, requires_grad=True)
    with SavedTensors([x, w]) as saved:
        h = x @ w  # keeps x (and w, for a gradient of x that nobody wants): both left out
        y = h.exp()  # keeps its result, [10, 3]
        z = y * y  # keeps y: the same storage
        u = z.view(30).sin()  # keeps its argument, another [10, 3]
        assert saved.live == 2 * 10 * 3 * 4
        u.sum().backward()
        del h, y, z, u
    gc.collect()
    assert saved.live == 0
    assert saved.peak == 2 * 10 * 3 * 4


def test_live_tensors_by_hand():
    x = torch.randn(100)
    with LiveTensors([x]) as alive:
        a = x + 1
        b = a * 2
        view = b[:50]
        assert alive.live == 800
        del a
        assert alive.live == 400
        x.mul_(2)
        x[:10].mul_(2)  # a view of what was left out
        del b
        assert alive.live == 400
        del view
        assert alive.live == 0
    assert alive.peak == 800


def test_storages_count_once():
    x = torch.zeros(10)
    assert storage_bytes([x, x[:5], x.view(2, 5), torch.zeros(3)]) == 52


@pytest.fixture
def count(toy_clip):
    """count(kind, classes, fake, **options) -> memory of a step on two images."""

    def run(kind, classes, fake=True, **options):
        network = build_network(toy_clip, classes, **options)
        naive, learner, kept = Naive(network), Learner(network), constants(network)
        step = NaiveStep(naive, learner) if kind is NaiveStep else kind(network, learner)
        images, labels = make_batch(network, 2, seed=1)
        there = [*network.parameters(), *network.buffers(), *kept, naive.ids, naive.mask]

        def loss(images, labels):
            return step.loss(labels, images=images)

        return count_step(loss, (images, labels), learner.parameters, there, fake)

    return run


@pytest.mark.parametrize("kind", [NaiveStep, FreshStep])
def test_a_step_without_data_keeps_what_the_step_keeps(count, kind):
    assert count(kind, 5) == count(kind, 5, fake=False)


def test_as_published_it_grows_evenly_with_the_classes(count):
    few, more, most = (count(NaiveStep, classes).activations for classes in (10, 20, 40))
    assert 2 * (more - few) == most - more > 0


def test_options_save_memory(count):
    plain = count(FreshStep, 30)
    for options in ({"text_chunk": 5}, {"checkpointing": True}):
        less = count(FreshStep, 30, **options)
        assert less.activations < plain.activations
        assert less.peak < plain.peak


def test_constants_are_those_of_the_class_list(toy_clip):
    small, large = (storage_bytes(constants(build_network(toy_clip, classes))) for classes in (10, 20))
    per_class = 8 * 32 * 4  # 13 - 5 tokens, width 32, fp32
    assert large - small >= 10 * per_class
    assert large < 20 * 4 * per_class  # what enters the first adapted block and leaves it, and token numbers

"""A toy network whose every part does something, with a batch for it."""

import pytest
import torch

from benchmarks.subject import build_clip, build_network, make_batch


@pytest.fixture(scope="session")
def toy_clip():
    return build_clip("toy")


@pytest.fixture
def network(toy_clip):
    network = build_network(toy_clip, 7, scale=0.5)
    torch.nn.init.normal_(network.learner.glr.head.weight, std=0.1)
    return network


@pytest.fixture
def batch(network):
    return make_batch(network, 3, seed=1)

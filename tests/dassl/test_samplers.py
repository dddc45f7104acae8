"""Samplers: what a batch is made of."""

from __future__ import annotations

import random

import pytest
import torch
from torch.utils.data import RandomSampler, SequentialSampler

from dassl.data.datasets import Datum
from dassl.data.samplers import AVAI_SAMPLERS, build_sampler
from dassl.utils import InputError


def data(labels, domains=None):
    return [
        Datum("x", label, domain, f"c{label}")
        for label, domain in zip(labels, domains or [0] * len(labels), strict=True)
    ]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batches(sampler, size):
    indices = list(sampler)
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def test_names():
    source = data([0, 1] * 8, [0] * 8 + [1] * 8)
    for name in AVAI_SAMPLERS:
        sampler = build_sampler(name, data_source=source, batch_size=4, n_ins=2)
        assert len(sampler) == len(list(sampler)) > 0
    assert type(build_sampler("RandomSampler", data_source=source)) is RandomSampler
    assert type(build_sampler("SequentialSampler", data_source=source)) is SequentialSampler
    with pytest.raises(ValueError, match='did you mean "RandomSampler"'):
        build_sampler("randomsampler", data_source=source)
    with pytest.raises(InputError, match="none"):
        build_sampler("RandomSampler", data_source=[])


@pytest.mark.parametrize("name", ["RandomDomainSampler", "SeqDomainSampler", "RandomClassSampler", "RandomSampler"])
def test_epochs_differ_and_repeat_under_a_seed(name):
    source = data([0, 1, 2, 3] * 10, [0] * 20 + [1] * 20)
    kwargs = {"data_source": source, "batch_size": 4, "n_ins": 2}
    before = random.getstate(), torch.get_rng_state().tolist()
    one, two = (build_sampler(name, generator=generator(), **kwargs) for _ in range(2))
    epochs = [list(one), list(one)]
    length = len(two)
    assert [list(two), list(two)] == epochs and epochs[0] != epochs[1]
    assert length == len(epochs[0])  # asking for the length changes nothing
    assert before == (random.getstate(), torch.get_rng_state().tolist())


def test_random_domains():
    source = data([0] * 30, [0] * 7 + [1] * 11 + [2] * 12)
    sampler = build_sampler("RandomDomainSampler", data_source=source, batch_size=6, n_domain=2, generator=generator())
    seen = []
    for batch in batches(sampler, 6):
        domains = [source[i].domain for i in batch]
        assert len(set(domains)) == 2 and all(domains.count(d) == 3 for d in set(domains))
        seen += batch
    assert len(seen) == len(set(seen))  # without replacement


def test_sequential_domains():
    source = data([0] * 20, [1] * 8 + [0] * 12)
    sampler = build_sampler("SeqDomainSampler", data_source=source, batch_size=4, generator=generator())
    found = batches(sampler, 4)
    assert len(found) == 4  # the domain of 8 gives 2 to each
    assert all([source[i].domain for i in batch] == [1, 1, 0, 0] for batch in found)


def test_random_classes():
    source = data([0] * 9 + [1] * 3 + [2] * 8)
    sampler = build_sampler("RandomClassSampler", data_source=source, batch_size=8, n_ins=4, generator=generator())
    for batch in batches(sampler, 8):
        labels = [source[i].label for i in batch]
        assert labels[0] != labels[4] and len(set(labels[:4])) == len(set(labels[4:])) == 1
    short = [i for i in sampler if source[i].label == 1]
    assert len(short) in (0, 4)  # a class with 3 items is filled up by repeating


@pytest.mark.parametrize(
    "name, kwargs, told",
    [
        ("RandomDomainSampler", {"batch_size": 5}, "multiple"),
        ("RandomDomainSampler", {"batch_size": 6, "n_domain": 3}, "N_DOMAIN"),
        ("SeqDomainSampler", {"batch_size": 40}, "smallest"),
        ("RandomClassSampler", {"batch_size": 4, "n_ins": 8}, "N_INS"),
        ("RandomClassSampler", {"batch_size": 8, "n_ins": 2}, "classes"),
    ],
)
def test_wrong_numbers(name, kwargs, told):
    with pytest.raises(InputError, match=told):
        build_sampler(name, data_source=data([0, 1] * 10, [0] * 10 + [1] * 10), **kwargs)

"""Samplers, which choose the items of each batch."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler, SequentialSampler

from dassl.config import CfgNode
from dassl.upstream_names import upstream_name
from dassl.utils import InputError, check_availability

from .datasets import Datum

__all__ = [
    "AVAI_SAMPLERS",
    "PlannedSampler",
    "RandomClassSampler",
    "RandomDomainSampler",
    "SeqDomainSampler",
    "build_sampler",
]

AVAI_SAMPLERS = [
    "RandomDomainSampler",
    "SeqDomainSampler",
    "RandomSampler",
    "SequentialSampler",
    "RandomClassSampler",
]


class PlannedSampler(Sampler[int]):
    """A sampler whose number of indices depends on the draw: an epoch is planned once, so that ``len`` is exact.

    Draws come from ``generator``, or without one from torch's default generator. The generators of Python and NumPy are
    left alone.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator
        self._next: list[int] | None = None

    def plan(self, rng: random.Random) -> list[int]:
        """Return the indices of one epoch."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop an epoch that was planned but not yet used; call this after seeding the generator anew."""
        self._next = None

    def _peek(self) -> list[int]:
        if self._next is None:
            seed = int(torch.randint(2**62, (1,), generator=self.generator))
            self._next = self.plan(random.Random(seed))
        return self._next

    def __iter__(self) -> Iterator[int]:
        indices = self._peek()
        self._next = None
        return iter(indices)

    def __len__(self) -> int:
        return len(self._peek())


class _DomainSampler(PlannedSampler):
    """Base of the two domain samplers: items by domain, and how many of each domain go into a batch."""

    def __init__(
        self, data_source: Sequence[Datum], batch_size: int, n_domain: int = 0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(generator)
        self.domain_dict: defaultdict[int, list[int]] = defaultdict(list)
        for index, item in enumerate(data_source):
            self.domain_dict[item.domain].append(index)
        self.domains = list(self.domain_dict)
        self.n_domain = n_domain if n_domain and n_domain > 0 else len(self.domains)
        if self.n_domain > len(self.domains):
            raise InputError(f"Expected N_DOMAIN to be at most {len(self.domains)} but got {n_domain}")
        if batch_size % self.n_domain:
            raise InputError(
                f"Expected the batch size to be a multiple of the {self.n_domain} domains in it but got {batch_size}"
            )
        self.n_img_per_domain = batch_size // self.n_domain
        smallest = min(len(indices) for indices in self.domain_dict.values())
        if smallest < self.n_img_per_domain:
            raise InputError(
                f"Expected at least {self.n_img_per_domain} items in each domain but the smallest has {smallest}"
            )

    def choose(self, rng: random.Random) -> list[int]:
        """Choose the domains of one batch."""
        raise NotImplementedError

    def plan(self, rng: random.Random) -> list[int]:
        # Shuffling once and cutting from the end is drawing without replacement.
        left = {domain: rng.sample(indices, len(indices)) for domain, indices in self.domain_dict.items()}
        output: list[int] = []
        while all(len(indices) >= self.n_img_per_domain for indices in left.values()):
            for domain in self.choose(rng):
                output.extend(left[domain][-self.n_img_per_domain :])
                del left[domain][-self.n_img_per_domain :]
        return output


class RandomDomainSampler(_DomainSampler):
    """Fill each batch from ``n_domain`` random domains, with equally many items; end when a domain runs short."""

    def choose(self, rng: random.Random) -> list[int]:
        return rng.sample(self.domains, self.n_domain)


class SeqDomainSampler(_DomainSampler):
    """Fill each batch with equally many items from every domain; domains come in the order of first appearance."""

    def __init__(self, data_source: Sequence[Datum], batch_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__(data_source, batch_size, 0, generator)

    def choose(self, rng: random.Random) -> list[int]:
        return self.domains


class RandomClassSampler(PlannedSampler):
    """Fill each batch with ``batch_size // n_ins`` random classes of ``n_ins`` items each.

    A class with fewer items is filled up by drawing with replacement. An epoch ends when too few classes have a group
    of ``n_ins`` items left.
    """

    def __init__(
        self, data_source: Sequence[Datum], batch_size: int, n_ins: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(generator)
        if not 1 <= n_ins <= batch_size:
            raise InputError(f"Expected N_INS to be in [1, batch size {batch_size}] but got {n_ins}")
        self.n_ins = n_ins
        self.ncls_per_batch = batch_size // n_ins
        self.index_dic: defaultdict[int, list[int]] = defaultdict(list)
        for index, item in enumerate(data_source):
            self.index_dic[item.label].append(index)
        self.labels = list(self.index_dic)
        if len(self.labels) < self.ncls_per_batch:
            raise InputError(
                f"Expected at least {self.ncls_per_batch} classes (batch size {batch_size} / N_INS {n_ins}) "
                f"but got {len(self.labels)}"
            )

    def plan(self, rng: random.Random) -> list[int]:
        groups: dict[int, list[list[int]]] = {}
        for label, indices in self.index_dic.items():
            short = len(indices) < self.n_ins
            drawn = rng.choices(indices, k=self.n_ins) if short else rng.sample(indices, len(indices))
            full = len(drawn) // self.n_ins  # a remainder smaller than n_ins sits this epoch out
            groups[label] = [drawn[i * self.n_ins : (i + 1) * self.n_ins] for i in range(full)]
        output: list[int] = []
        available = list(self.labels)
        while len(available) >= self.ncls_per_batch:
            for label in rng.sample(available, self.ncls_per_batch):
                output.extend(groups[label].pop(0))
                if not groups[label]:
                    available.remove(label)
        return output


def build_sampler(
    sampler_type: str,
    cfg: CfgNode | None = None,
    data_source: Sequence[Datum] | Sized | None = None,
    batch_size: int = 32,
    n_domain: int = 0,
    n_ins: int = 16,
    generator: torch.Generator | None = None,
) -> Sampler[int]:
    """Build the sampler ``sampler_type`` over ``data_source``; an unknown name is an InputError (a ValueError).

    Args:
        sampler_type: one of AVAI_SAMPLERS.
        cfg: not used; upstream's signature has it.
        data_source: the items.
        batch_size: items per batch.
        n_domain: RandomDomainSampler: domains per batch; 0: all.
        n_ins: RandomClassSampler: items per class in a batch.
        generator: source of randomness; None: torch's default.
    """
    check_availability(sampler_type, AVAI_SAMPLERS)
    if data_source is None or len(data_source) == 0:
        raise InputError("Expected data to sample from but got none")
    if sampler_type == "RandomSampler":
        return RandomSampler(data_source, generator=generator)
    if sampler_type == "SequentialSampler":
        return SequentialSampler(data_source)
    items: Sequence[Datum] = data_source  # type: ignore[assignment]
    if sampler_type == "RandomDomainSampler":
        return RandomDomainSampler(items, batch_size, n_domain, generator)
    if sampler_type == "SeqDomainSampler":
        return SeqDomainSampler(items, batch_size, generator)
    return RandomClassSampler(items, batch_size, n_ins, generator)


def __getattr__(name: str) -> Any:  # names that upstream's module offers, too
    return upstream_name(__name__, name)

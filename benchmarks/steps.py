"""One training step in three ways on the same weights: as published, accelerated, and accelerated on kept views."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Stopwatch
from benchmarks.naive import Naive


@contextmanager
def taken_back(pairs: Iterable[tuple[Any, Any]]) -> Iterator[None]:
    """Forget at the end of the context what these (module, optimizer) pairs learned within it."""
    kept = [(each, copy.deepcopy(each.state_dict())) for pair in pairs for each in pair]
    yield
    for each, state in kept:
        each.load_state_dict(state)


class Learner:
    """Hold what is learnt, its AdamW, and a way back to the state before a step.

    The optimizer's values are those of the published configuration.
    """

    def __init__(self, network: Any) -> None:
        self.parameters = list(network.learner.parameters())
        self.module = network.learner
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=1e-4, eps=1e-4)

    def taken_back(self) -> AbstractContextManager[None]:
        """Return a context at whose end what was learned within is forgotten."""
        return taken_back([(self.module, self.optimizer)])


class FreshStep:
    """The accelerated step on images that were augmented afresh."""

    name = "fresh"

    def __init__(self, network: Any, learner: Learner) -> None:
        self.network, self.learner = network, learner

    def prepare(self, images: Tensor) -> None:
        """Prepare the step's inputs, before the clock runs."""
        self.inputs: dict[str, Any] = {"images": images}

    def batch(self) -> dict[str, Any]:
        """The step's arguments, on the clock."""
        return self.inputs

    def loss(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        outputs = self.network(**inputs)
        return torch.stack(list(self.network.losses(outputs, labels).values())).sum()

    def backward(self, loss: Tensor) -> None:
        """Leave the gradients that the optimizer takes."""
        loss.backward()

    def step(self, labels: Tensor, watch: Stopwatch) -> float:
        """Forward, backward, optimizer -> the loss."""
        with watch:
            self.learner.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(labels, **self.batch())
            self.backward(loss)
            self.learner.optimizer.step()
        return float(loss.detach())


class ViewsStep(FreshStep):
    """The accelerated step on views whose frozen part is kept in RAM and taken from there by row."""

    name = "views"

    def prepare(self, images: Tensor) -> None:
        kept = self.network.frozen_part(images)
        self.inputs = {"features": kept.features, "hidden": kept.hidden}
        self.store = {name: value.cpu() for name, value in self.inputs.items()}
        self.rows = torch.arange(len(images))  # the batch's own order: its labels are in it

    def batch(self) -> dict[str, Any]:
        return {name: value[self.rows].to(self.network.clip.device) for name, value in self.store.items()}


class NaiveStep:
    """The step as published.

    Args:
        chunk: 0, or how many classes are encoded at once where the activations of all do not fit in memory. Then the
            text features and the loss's gradient with respect to them are found first (of this only the encoding of
            the text, without autograd, is off the clock), and the clock sees each chunk's forward and backward pass
            once: the same work, no more and no less, as with all classes at once.
    """

    name = "naive"

    def __init__(self, naive: Naive, learner: Learner, chunk: int = 0) -> None:
        self.naive, self.learner, self.chunk = naive, learner, chunk

    def prepare(self, images: Tensor) -> None:
        self.inputs: dict[str, Any] = {"images": images}

    def loss(self, labels: Tensor, images: Tensor) -> Tensor:
        return self.naive.loss(images, labels)

    def step(self, labels: Tensor, watch: Stopwatch) -> float:
        optimizer = self.learner.optimizer
        if not self.chunk:
            with watch:
                optimizer.zero_grad(set_to_none=True)
                loss = self.loss(labels, **self.inputs)
                loss.backward()
                optimizer.step()
            return float(loss.detach())
        chunks = self.naive.ids.split(self.chunk)
        with torch.no_grad():
            features = torch.cat([self.naive.text_features(ids) for ids in chunks])
        features.requires_grad_()
        with watch:
            optimizer.zero_grad(set_to_none=True)
            loss = self.naive.loss(self.inputs["images"], labels, features)
            loss.backward()
            assert features.grad is not None
            for ids, grad in zip(chunks, features.grad.split(self.chunk), strict=True):
                self.naive.text_features(ids).backward(grad)
            optimizer.step()
        return float(loss.detach())


def gradients(step: Any, labels: Tensor) -> list[Tensor]:
    """The gradients that a step leaves in what is learnt, without the step."""
    with step.learner.taken_back():
        step.step(labels, Stopwatch(labels.device))
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in step.learner.parameters]

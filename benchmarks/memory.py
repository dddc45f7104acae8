"""Memory of a training step, counted instead of read off an allocator.

`SavedTensors` counts what autograd keeps between forward and backward; `LiveTensors` every tensor a step makes, and the
most that is alive at once. Both count storages, each once, and leave out those that they are told are there anyway
(weights, inputs, constants). Under `count_step(..., fake=True)` the step runs on tensors without data: shapes and
storages are those of the real step, so that a step can be counted that would fit no memory.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({_key(t): t.untyped_storage().nbytes() for t in tensors}.values())


def constants(network: Any) -> list[Tensor]:
    """The tensors that a `DLRCLIPNetwork` keeps between steps beside its parameters and buffers.

    They are those of the class list: what of the text branch no step changes.
    """
    network.eval()
    with torch.no_grad():
        network.text_features()  # some are made when they are first asked for
    network.train()
    return _tensors(
        {k: v for k, v in vars(network).items() if not k.startswith(("_modules", "_buffers", "_text_cache"))}
    )


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in a value, through containers and plain objects but not into modules."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.Module) or callable(value):
        return []
    if isinstance(value, dict):
        return [t for item in value.values() for t in _tensors(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in _tensors(item)]
    return _tensors(vars(value)) if hasattr(value, "__dict__") else []


class _Held:
    """A tensor that autograd keeps, for as long as autograd keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Context manager that counts the storages that autograd keeps.

    Args:
        exclude: tensors whose storages are not counted.

    Attributes:
        live: bytes kept now. peak: the most that was kept at once.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        self.live = self.peak = 0
        self._excluded = {_key(t) for t in exclude}
        self._holders: dict[int, int] = {}
        super().__init__(self._pack, lambda held: held.tensor)

    def __enter__(self) -> SavedTensors:  # type: ignore[override]
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> _Held:
        held, key = _Held(tensor), _key(tensor)
        if key not in self._excluded:
            size = tensor.untyped_storage().nbytes()
            if key not in self._holders:
                self.live += size
                self.peak = max(self.peak, self.live)
            self._holders[key] = self._holders.get(key, 0) + 1
            weakref.finalize(held, self._release, key, size)
        return held

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.live -= size


class LiveTensors(TorchDispatchMode):
    """Context manager that counts the storages of all results of operations while they are alive.

    Attributes: as in `SavedTensors`. What a kernel needs inside itself is not seen.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._excluded = {_key(t) for t in exclude}
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._excluded or key in self._alive:
            return
        self._alive.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.live -= size


class StepMemory(NamedTuple):
    """Bytes of a training step.

    Attributes:
        activations: what autograd keeps at the end of the forward pass.
        peak: the most that is alive at once in forward and backward, gradients and temporary tensors included;
            weights, inputs and constants not.
    """

    activations: int
    peak: int


def count_step(
    loss: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    parameters: Iterable[Tensor],
    there: Iterable[Tensor] = (),
    fake: bool = True,
) -> StepMemory:
    """Counts one forward and backward pass.

    Args:
        loss: called with `inputs`.
        parameters: what gradients are taken of.
        there: further tensors that lie in memory between steps.
        fake: run on tensors without data.
    """
    learnt, resident = list(parameters), [*inputs, *parameters, *there]
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with mode:
        if isinstance(mode, FakeTensorMode):  # the same stand-ins will come up when the step uses these tensors
            inputs = tuple(mode.from_tensor(t) for t in inputs)
            resident += [mode.from_tensor(t) for t in resident]
        with LiveTensors(resident) as alive, SavedTensors(resident) as saved:
            value = loss(*inputs)
            activations = saved.live
            gradients = torch.autograd.grad(value, learnt, allow_unused=True)
    del gradients, value
    return StepMemory(activations, alive.peak)

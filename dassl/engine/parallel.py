"""One model in several processes: gradients are averaged, and rank 0's values count.

Why not DistributedDataParallel: it averages what a module's own ``forward`` has computed, and the models that trainers
register are often not called: a learner holds the parameters, and the network around it, which is not registered,
computes. So the gradients are averaged by hand, between backward and the optimizer's step, for the parameters that the
optimizer has. The result is the same; only the overlap with backward is lost, which is little where few parameters are
trained.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn

from dassl.engine.checkpointing.generators import generator_states, set_generators
from dassl.utils import distributed

__all__ = ["average_gradients", "copy_from_main", "own_draws"]

CHUNK = 2**23  # the least number of values that are sent at once, if there are so many


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks, in place.

    A missing gradient counts as zero. If no rank has a parameter's gradient, it stays missing, as optimizers expect.

    Args:
        parameters: in the same order on all ranks.
    """
    if distributed.world_size() == 1:
        return
    kinds: dict[tuple[torch.device, torch.dtype], list[list[nn.Parameter]]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            kind = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
            chunks = kinds.setdefault(kind, [[]])
            if sum(p.numel() for p in chunks[-1]) >= CHUNK:
                chunks.append([])
            chunks[-1].append(parameter)
    for (device, dtype), chunks in kinds.items():
        for chunk in chunks:
            _average(chunk, device, dtype)


def _average(chunk: list[nn.Parameter], device: torch.device, dtype: torch.dtype) -> None:
    has = torch.tensor([p.grad is not None for p in chunk], dtype=dtype, device=device)
    own = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in chunk]
    total = distributed.all_reduce_sum(torch.cat([has, *(grad.to(dtype) for grad in own)]))
    somewhere, total = total[: len(chunk)], total[len(chunk) :] / distributed.world_size()
    missing = any(p.grad is None for p in chunk)
    known = (somewhere > 0).tolist() if missing else [True] * len(chunk)  # asking a GPU makes it wait: only if needed
    for parameter, mean, there in zip(chunk, total.split([p.numel() for p in chunk]), known, strict=True):
        mean = mean.view_as(parameter).to(parameter.dtype)
        if parameter.grad is not None:
            parameter.grad.copy_(mean)
        elif there:
            parameter.grad = mean.clone()


def copy_from_main(models: Iterable[nn.Module | None], frozen: bool = False) -> None:
    """Give all ranks rank 0's buffers and trained parameters (``frozen``: all parameters), in place."""
    if distributed.world_size() == 1:
        return
    with torch.no_grad():
        for model in models:
            if model is not None:
                parameters = [p for p in model.parameters() if frozen or p.requires_grad]
                for tensor in (*parameters, *model.buffers()):
                    theirs = distributed.broadcast_tensor(tensor)
                    if not distributed.is_main():
                        tensor.copy_(theirs)


@contextlib.contextmanager
def own_draws() -> Iterator[None]:
    """Let each rank above 0 draw random numbers of its own (for the dropout of its images, say).

    Use this context for steps on parts of a batch; on a whole batch, all ranks must draw alike. Rank 0 draws what a
    single process would. When the context ends, all ranks take over the states of rank 0's generators, so that draws
    outside of steps are the same on all.
    """
    if distributed.world_size() == 1:
        yield
        return
    if distributed.rank() > 0:
        base = int(torch.randint(2**62, (1,)))
        words = np.random.SeedSequence([base, distributed.rank()]).generate_state(3, dtype=np.uint32)
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        torch.manual_seed(int(words[2]))
    yield
    set_generators(distributed.broadcast_object(generator_states()))

"""Let several processes run one job: tell which of them this is, and exchange values between them.

torchrun starts the processes and says in environment variables who is who. ``connect`` joins them, ``start`` opens the
process group (nccl with GPUs, gloo on CPUs), ``stop`` closes it. In a process that torchrun has not started, all
functions answer for a job of one and do nothing else, so that callers need not ask.

A function that waits for other processes never hangs: it raises a PeerLostError when one of them has ended, or has not
come within the group's timeout.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import stopping
from .errors import InputError

__all__ = [
    "PeerLostError", "active", "all_reduce_mean", "all_reduce_sum", "any_rank", "barrier", "broadcast_object",
    "broadcast_tensor", "check_same", "connect", "first_to_fail", "gather_objects", "gather_rows", "is_main",
    "is_peer_lost", "largest", "launched", "local_rank", "local_world_size", "main_first", "rank", "start",
    "stop", "world_size", "why_it_ends",
]  # fmt: skip

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
CHECK_IN = 5.0  # seconds in which a process that still runs says so, after another one was lost
SETTLING = 0.2  # seconds that gloo's threads get to finish with the last call
GO_ON = "the same command goes on from the last checkpoint"


class PeerLostError(RuntimeError):
    """Another process of the job ended, or did not come to where this one waited for it."""


class _Job:
    """This process's place among the others, once ``connect`` has found it."""

    def __init__(self, store: Any, runs: int) -> None:
        self.store = dist.PrefixStore(f"run{runs}", store)
        self.control: Any = None  # gloo group for objects and barriers; None: the default group is one
        self.started = False
        self.minutes = 0.0


_job: _Job | None = None
_store: Any = None  # one per process: a second run in the process uses the same connection
_runs = 0


def launched() -> bool:
    """Return whether torchrun (or a launcher that sets the same variables) has started this process."""
    return all(name in os.environ for name in VARIABLES)


def active() -> bool:
    """Return whether this process belongs to a job whose process group is open; such a job may have one process."""
    return _job is not None and _job.started


def rank() -> int:
    """Return the number of this process in the job; 0 is the process that writes."""
    return int(os.environ["RANK"]) if _job is not None else 0


def world_size() -> int:
    """Return the number of processes of the job."""
    return int(os.environ["WORLD_SIZE"]) if _job is not None else 1


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ["LOCAL_RANK"]) if _job is not None else 0


def local_world_size() -> int:
    """Return the number of processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _job is not None else 1


def is_main() -> bool:
    """Return whether this is the process that writes files and prints (rank 0)."""
    return rank() == 0


# ---- begin and end


def connect() -> None:
    """Join the processes that torchrun has started; from now on ranks are known and failures can be told."""
    global _job, _store, _runs
    if _job is not None or not launched():
        return
    if _store is None:
        from torch.distributed.rendezvous import rendezvous

        _store = next(iter(rendezvous("env://")))[0]
    _runs += 1
    _job = _Job(_store, _runs)


def start(use_cuda: bool, minutes: float) -> None:
    """Open the process group.

    Args:
        use_cuda: each process takes the GPU of its local rank, where there are any.
        minutes: how long a process waits for another one.

    Raises:
        InputError: a time that is not positive, or more processes on this machine than it has GPUs.
    """
    if minutes <= 0:
        raise InputError(f"Expected DIST.TIMEOUT to be above 0 minutes but got {minutes}")
    if _job is None or _job.started:
        return
    cuda = use_cuda and torch.cuda.is_available()
    if cuda:
        count = torch.cuda.device_count()
        if local_world_size() > count:
            raise InputError(
                f"Expected at most {count} processes on a machine with {count} GPUs but got {local_world_size()}: "
                "lower --nproc_per_node, or set USE_CUDA False"
            )
        torch.cuda.set_device(local_rank())
    timeout = datetime.timedelta(minutes=minutes)
    _job.minutes = minutes
    nccl = cuda and dist.is_nccl_available()
    with _watched():
        dist.init_process_group(
            "nccl" if nccl else "gloo",
            store=dist.PrefixStore("group", _job.store),
            rank=rank(),
            world_size=world_size(),
            timeout=timeout,
        )
        if nccl:  # objects travel over the CPU: no GPU waits for them, and a lost process is noticed at once
            _job.control = dist.new_group(backend="gloo", timeout=timeout)
    _job.started = True


def stop() -> None:
    """Close the process group, at the end of a job that went well."""
    global _job
    if _job is not None and _job.started:
        if torch.__version__ < "2.8":
            # Its end waits for gloo's threads and lets no other thread run Python meanwhile. A thread that still has a
            # tensor of the last call to let go of needs Python for a moment: without this, both wait forever.
            time.sleep(SETTLING)
        dist.destroy_process_group()
    _job = None


# ---- failing


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Turn a RuntimeError in the block into a PeerLostError: what fails there failed because of another process."""
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own, nccl's and the store's are subclasses
        stopping.ignore_further()  # torchrun ends all when one has ended; this process must first say why
        reason = (str(error).splitlines() or [""])[0]
        reason = re.sub(r"^\[\S+\] ", "", reason)  # the place in the source file
        raise PeerLostError(reason) from error


def is_peer_lost(error: BaseException) -> bool:
    """Return whether an error comes from another process, torch's own errors of communication included.

    A trainer that talks to other processes itself gets those.
    """
    if isinstance(error, PeerLostError):
        return True
    told = re.search(r"gloo|nccl|connection (closed|reset)|timed out", str(error), re.IGNORECASE)
    return active() and isinstance(error, RuntimeError) and told is not None


def first_to_fail() -> bool:
    """Return whether this is the first process of the job to say that it fails; only the first gives its reason.

    An error that all processes meet (a wrong setting, say) is then told once. A process that only lost another one,
    which has told its reason, is silent.
    """
    if _job is None:
        return True
    try:
        return _job.store.add("failed", 1) == 1
    except RuntimeError:  # where torchrun itself has ended
        return is_main()


def why_it_ends(error: BaseException) -> str:
    """Explain a PeerLostError or StoppedError in one line: which processes are gone, and how to go on.

    This takes up to CHECK_IN seconds, in which the processes that still run say so; all of them must call it.
    """
    stopping.ignore_further()
    stopped = isinstance(error, stopping.StoppedError)
    missing = _missing()
    lost = ", ".join(f"rank {number}" for number in missing)
    if missing:
        what = f"{lost} of this job ended or hung (killed, out of memory, or its machine is gone)"
        if stopped:  # a process that waits for this one cannot hear of a signal
            what += f", or waits for this one, which was told to end ({error})"
    elif stopped:
        what = f"this job was told to end ({error})"
    else:
        what = "another process of this job ended or hung"
    told = "" if stopped else str(error)
    reason = " ".join(told.split()).partition(". ")[0][:200]  # torch's advice is left out
    reason = f" [{reason}]" if reason else ""
    return f"rank {rank()}: {what}: {GO_ON}{reason}"


def _missing() -> list[int]:
    """Return the ranks that do not say within CHECK_IN seconds that they run; none if one has told its failure."""
    if _job is None:
        return []
    try:
        _job.store.set(f"runs{rank()}", "1")
        silent = [number for number in range(world_size()) if number != rank()]
        end = time.monotonic() + CHECK_IN
        while silent and time.monotonic() < end:
            if _job.store.add("failed", 0) > 0:
                return []
            time.sleep(0.05)
            silent = [number for number in silent if not _job.store.check([f"runs{number}"])]
        return silent
    except RuntimeError:
        return []


# ---- talking


def barrier() -> None:
    """Wait until all processes are here.

    Raises:
        PeerLostError: a process did not come in time.
    """
    if _job is not None and _job.started and world_size() > 1:
        with _watched():
            dist.barrier(group=_job.control)


def broadcast_object(value: T) -> T:
    """Return rank 0's ``value`` on all ranks; it is pickled, so it should be small."""
    if _job is None or not _job.started or world_size() == 1:
        return value
    box = [value if is_main() else None]
    with _watched():
        dist.broadcast_object_list(box, src=0, group=_job.control)
    return box[0]  # type: ignore[return-value]


def broadcast_tensor(tensor: Tensor) -> Tensor:
    """Return rank 0's ``tensor``, bit by bit, on all ranks; each rank gives one of the same shape and type."""
    if _job is None or not _job.started or world_size() == 1 or tensor.numel() == 0:
        return tensor.detach()
    box = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    with _watched():
        dist.broadcast(box, src=0, group=_group(box))
    return box.view(tensor.dtype).reshape(tensor.shape)


def gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, in their order, on all ranks; they are pickled, so they should be small."""
    if _job is None or not _job.started or world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    with _watched():
        dist.all_gather_object(box, value, group=_job.control)
    return box


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of the ranks' tensors (of one shape): a new tensor, without gradient, on the same device."""
    total = tensor.detach().clone()
    if _job is not None and _job.started and world_size() > 1:
        with _watched():
            dist.all_reduce(total, group=_group(total))
    return total


def any_rank(here: bool) -> bool:
    """Return whether ``here`` is true on any rank; all ranks get the same answer."""
    if not active() or world_size() == 1:
        return here
    return bool(all_reduce_sum(torch.tensor(float(here))) > 0)  # on the CPU: no GPU waits for it


def all_reduce_mean(tensor: Tensor, weight: float = 1.0) -> Tensor:
    """Return the mean of the ranks' tensors, each weighted by its rank's ``weight`` (its number of samples, say).

    Args:
        tensor: floating point, of one shape on all ranks; the result is a new one, without gradient, of its type.
        weight: 0 or more, not 0 on all ranks.
    """
    if not active() or world_size() == 1:
        return tensor.detach().clone()
    wide = tensor.detach().reshape(-1).to(torch.promote_types(tensor.dtype, torch.float32))
    total = all_reduce_sum(torch.cat([wide * weight, wide.new_full((1,), weight)]))
    return (total[:-1] / total[-1]).reshape(tensor.shape).to(tensor.dtype)


def largest(*values: int) -> list[int]:
    """Return, for each value, the largest that any rank has; all ranks get the same list."""
    if _job is None or not _job.started or world_size() == 1:
        return list(values)
    box = torch.tensor(values)
    with _watched():
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_job.control)
    return box.tolist()


def gather_rows(tensor: Tensor, counts: Sequence[int]) -> Tensor:
    """Return all ranks' rows, in the order of the ranks, on all ranks; bits are kept and gradients are not.

    Args:
        tensor: [n, ...] with n at least ``counts[rank()]``; further rows are left out.
        counts: number of rows of each rank.
    """
    mine = tensor.detach()[: counts[rank()]]
    if _job is None or not _job.started or world_size() == 1:
        return mine
    # Bytes, because gloo does not know every number format; padded, because pieces must be equally long.
    size = tensor[0].numel() * tensor.element_size()
    padded = torch.zeros(max(counts), size, dtype=torch.uint8, device=tensor.device)
    if len(mine):
        padded[: len(mine)] = mine.reshape(len(mine), -1).contiguous().view(torch.uint8)
    pieces = [torch.empty_like(padded) for _ in counts]
    with _watched():
        dist.all_gather(pieces, padded, group=_group(padded))
    rows = torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])
    return rows.view(tensor.dtype).reshape(len(rows), *tensor.shape[1:])


def _group(tensor: Tensor) -> Any:
    assert _job is not None
    return None if tensor.is_cuda else _job.control


def check_same(what: str, value: Any) -> None:
    """Raise on all ranks unless all have the same ``value``.

    Raises:
        InputError: the values differ; the message says on which ranks.
    """
    values = gather_objects(value)
    others = [str(number) for number, theirs in enumerate(values) if theirs != values[0]]
    if others:
        raise InputError(
            f"Expected {what} to be the same in all processes but rank {', '.join(others)} differs from rank 0: "
            "do all machines see the same files?"
        )


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Let rank 0 go through the block first and the others after it: for code that makes files which all then read.

    If rank 0 fails, the others do not begin.

    Raises:
        PeerLostError: on the other ranks, if rank 0 failed.
    """
    if not active() or world_size() == 1:
        yield
    elif is_main():
        try:
            yield
        except BaseException:
            broadcast_object(False)
            raise
        broadcast_object(True)
    else:
        if not broadcast_object(True):
            raise PeerLostError("rank 0 failed")
        yield

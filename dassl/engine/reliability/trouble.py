"""Trouble with the machine, which is neither a bug nor a wrong input: what the trouble is, and what helps.

Full disks, memory that runs out, and loader processes that die end a run with a line or two, not with a traceback.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

import torch

from dassl.utils.text import one_line

__all__ = ["RunStoppedError", "explain_trouble"]

BATCHES = "a smaller DATALOADER.TRAIN_X.BATCH_SIZE (and TEST.BATCH_SIZE)"
_FEWER_WORKERS = "What helps: fewer DATALOADER.NUM_WORKERS (0: none), a smaller DATALOADER.CACHE_IMAGES"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (is killed|exited unexpectedly)")
# torch's allocator for the CPU, and its writer of zip files, raise RuntimeErrors.
_HOST_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|not enough memory", re.IGNORECASE)
_WRITER = re.compile(r"PytorchStreamWriter failed|file write failed|unexpected pos", re.IGNORECASE)


class RunStoppedError(Exception):
    """A run that could not go on, for a reason outside of it; ``str`` is fit for the screen as it is."""


def explain_trouble(error: BaseException, memory_advice: Sequence[str] = (), batches: str = BATCHES) -> str:
    """Return what went wrong and what helps, in one line; "" unless it is known trouble with the machine.

    Args:
        error: what ended the run. If an OSError made torch's writer of files fail, the OSError counts.
        memory_advice: settings that need less memory, beside the batch size.
        batches: how to ask for smaller batches.
    """
    less_memory = f"What helps: {', '.join([batches, *memory_advice])}"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        what = f" ({asked.group(1)} more were asked for)" if asked else ""
        return f"The GPU's memory is full{what}. {less_memory}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _HOST_MEMORY.search(str(error))):
        return f"This machine's memory is full. {less_memory}, or fewer DATALOADER.NUM_WORKERS"
    if isinstance(error, RuntimeError):
        dead = _DEAD_WORKER.search(str(error))
        if dead:
            return (
                f"A process that loads images died (pid {dead.group(1)}): killed, for want of memory most likely. "
                f"{_FEWER_WORKERS}"
            )
        if _WRITER.search(str(error)):
            cause = error.__cause__ or error.__context__
            if isinstance(cause, OSError):
                return explain_trouble(cause)
            return f"A file could not be written: {_text(error)}"
    if isinstance(error, ConnectionError | EOFError):  # nothing else here talks to another process this way
        return f"A process that loads images died. {_FEWER_WORKERS}"
    if isinstance(error, OSError) and error.errno is not None:  # one without a number is a library's, not the system's
        where = f": {one_line(str(error.filename))}" if error.filename else ""
        helps = ". What helps: room on that disk, or another --output-dir" if error.errno in _NO_SPACE else ""
        return f"{error.strerror or _text(error)}{where}{helps}"
    return ""


def _text(error: BaseException) -> str:
    return one_line(str(error) or type(error).__name__, 300)

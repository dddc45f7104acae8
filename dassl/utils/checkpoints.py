"""Write and read checkpoint files.

A checkpoint holds tensors and plain Python values only, so that ``torch.load(weights_only=True)`` reads it: nothing
else is ever written or accepted.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from .errors import InputError
from .files import atomic_write, check_sum, checked_write
from .logger import DETAIL

logger = logging.getLogger(__name__)
BEST_NAME = "model-best.pth.tar"
POINTER_NAME = "checkpoint"  # text file with the name of the file written last
_PathLike = str | os.PathLike[str]


def plain(value: Any, where: str = "state") -> Any:
    """Copy ``value`` into tensors, dicts, lists, tuples, numbers, strings, bytes, bools and None only.

    Args:
        value: nested containers of such values; NumPy scalars and subclasses of dict or Tensor are turned plain.
        where: the name of ``value`` in an error.

    Raises:
        TypeError: ``value`` holds something else, e.g. a live scheduler object.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().as_subclass(torch.Tensor)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if isinstance(value, Mapping):
        return {plain(k, f"a key of {where}"): plain(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, list | tuple):
        copy = [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
        return tuple(copy) if isinstance(value, tuple) else copy
    raise TypeError(
        f"Expected {where} to be a tensor or a plain value (a checkpoint holds nothing else) "
        f"but got {type(value).__module__}.{type(value).__qualname__}"
    )


def _without_module(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the ``module.`` that DataParallel and DistributedDataParallel put before every name."""
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def save_checkpoint(
    state: Mapping[str, Any],
    save_dir: _PathLike,
    is_best: bool = False,
    remove_module_from_keys: bool = True,
    model_name: str = "",
) -> None:
    """Write ``state`` to ``<save_dir>/<model_name>``, with a checksum, and its name to ``<save_dir>/checkpoint``.

    Args:
        state: at least ``state_dict`` and ``epoch`` (number of finished epochs); tensors and plain values only.
        save_dir: folder, created if missing.
        is_best: copy the file to ``model-best.pth.tar`` too.
        remove_module_from_keys: drop a leading ``module.`` from the names in ``state_dict``.
        model_name: file name; empty: ``model.pth.tar-<epoch>``.

    Raises:
        TypeError: ``state`` holds something that is neither a tensor nor a plain value.
    """
    content = plain(state, "the checkpoint")
    if remove_module_from_keys:
        content["state_dict"] = _without_module(content["state_dict"])
    folder = Path(save_dir)
    path = folder / (model_name or f"model.pth.tar-{content['epoch']}")
    with checked_write(path) as stream:
        torch.save(content, stream)
    # The pointer is written after the file that it names, so that it never names a missing one.
    with atomic_write(folder / POINTER_NAME, lasting=False) as stream:
        stream.write(f"{path.name}\n")
    logger.info("Checkpoint saved to %s", path, extra=DETAIL)
    if is_best:
        with open(path, "rb") as source, checked_write(folder / BEST_NAME) as stream:
            shutil.copyfileobj(source, stream)
        logger.info('Best checkpoint saved to "%s"', folder / BEST_NAME, extra=DETAIL)


class _Inert:
    """A stand-in for a live object in a checkpoint: nothing of the object is kept and none of its code runs."""

    def __setstate__(self, state: Any) -> None:
        pass


# With warm-up, upstream's checkpoints hold the wrapped scheduler as a live object, which in turn holds its optimizer.
_LIVE = (
    *(("torch.optim.lr_scheduler", name) for name in ("CosineAnnealingLR", "StepLR", "MultiStepLR")),
    *(("torch.optim." + name.lower(), name) for name in ("SGD", "Adam", "AdamW", "RMSprop")),
    ("dassl.optim.radam", "RAdam"),
)


# The weights-only loader fills plain dicts only, so the optimizer's defaultdict is replaced by one.
_STAND_INS = [
    *(type(name, (_Inert,), {"__module__": module}) for module, name in _LIVE),
    type("defaultdict", (), {"__module__": "collections", "__new__": lambda cls, *args: {}}),
]


def _load_plain(fpath: _PathLike) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")  # the file is about to be refused
        return torch.load(fpath, map_location="cpu", weights_only=True)


def _load_without_scheduler(fpath: _PathLike) -> Any:
    """Read a checkpoint of upstream whose scheduler is a live object; its entry becomes None.

    Raises:
        pickle.UnpicklingError: the checkpoint holds other objects.
    """
    before = list(torch.serialization.get_safe_globals())  # a copy: torch 2.4 gives its own list
    torch.serialization.add_safe_globals([*_STAND_INS, dict])  # torch finds them by name
    try:
        content = _load_plain(fpath)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    if isinstance(content, dict) and "scheduler" in content:
        content["scheduler"] = None
    try:
        return plain(content, "the checkpoint")
    except TypeError as error:
        raise pickle.UnpicklingError(str(error)) from error


def load_checkpoint(fpath: _PathLike | None) -> Any:
    """Read a checkpoint to the CPU, admitting tensors and plain values only; its checksum, if any, is checked.

    Upstream's checkpoints of runs with warm-up hold a live scheduler. Of these, all the rest is read and the entry
    "scheduler" is None.

    Raises:
        InputError: no path given, or the file is damaged or holds Python objects.
        FileNotFoundError: no such file.
    """
    if fpath is None:
        raise InputError("Expected the path of a checkpoint but got None")
    if not os.path.isfile(fpath):
        raise FileNotFoundError(f'Expected a checkpoint at "{fpath}" but found no file')
    try:
        check_sum(fpath)
        try:
            return _load_plain(fpath)
        except pickle.UnpicklingError:
            return _load_without_scheduler(fpath)
    except pickle.UnpicklingError as error:
        # torch's own message advises switching the check off; ours must not.
        raise InputError(
            f'Expected "{fpath}" to hold tensors and plain values only but it holds other Python objects '
            "or is damaged; loading those could run code, so the file is refused"
        ) from error
    except InputError:
        raise
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f'Expected "{fpath}" to be a readable checkpoint but got: {reason}') from error


def checkpoint_entry(checkpoint: Any, key: str, fpath: _PathLike) -> Any:
    """Return ``checkpoint[key]``; a missing key is an InputError that names the file."""
    if not isinstance(checkpoint, Mapping) or key not in checkpoint:
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise InputError(f'Expected the checkpoint "{fpath}" to have an entry "{key}" but got {found}')
    return checkpoint[key]


def load_into(target: Any, state: Any, fpath: _PathLike, what: str) -> None:
    """Call ``target.load_state_dict(state)``; a state that does not fit is an InputError that names the file."""
    try:
        target.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f'Expected "{fpath}" to fit the {what} but got: {reason}') from error


def is_file_name(name: str) -> bool:
    """Return whether a pointer's text can be the name of a file in its folder, not a path to elsewhere."""
    return len(name) <= 200 and "\0" not in name and Path(name).name == name


def pointed_file(fdir: _PathLike) -> Path:
    """Return the checkpoint that ``<fdir>/checkpoint`` names.

    Raises:
        InputError: there is no such text file, or it names a file that is not there.
    """
    pointer = Path(fdir) / POINTER_NAME
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except FileNotFoundError as error:
        raise InputError(f'Expected a file "{pointer}" naming the checkpoint to resume but found none') from error
    except (OSError, ValueError) as error:
        raise InputError(f'Expected "{pointer}" to name a checkpoint but got: {error}') from error
    path = Path(fdir) / name
    if not is_file_name(name) or not path.is_file():
        raise InputError(f'Expected "{pointer}" to name a file of its folder but got "{name}", which is not there')
    return path


def restore(
    checkpoint: Mapping[str, Any],
    fpath: _PathLike,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,
) -> int:
    """Load the parts of a checkpoint (read by load_checkpoint from ``fpath``) into their targets; return its epoch."""
    load_into(model, checkpoint_entry(checkpoint, "state_dict", fpath), fpath, "model")
    logger.info("Loaded model weights", extra=DETAIL)
    epoch = int(checkpoint_entry(checkpoint, "epoch", fpath))
    for name, target in (("optimizer", optimizer), ("scheduler", scheduler)):
        state = checkpoint.get(name)
        if target is not None and state is not None:
            load_into(target, state, fpath, name)
            logger.info("Loaded %s", name, extra=DETAIL)
        elif name == "scheduler" and epoch and hasattr(scheduler, "go_to_epoch"):
            # Upstream's warm-up saves itself as an object whose position stands still once the warm-up is over.
            scheduler.go_to_epoch(epoch)
            logger.warning('No scheduler state in "%s": the schedule goes on after %d epochs', fpath, epoch)
        elif target is not None:
            logger.warning('No %s state in "%s": it starts afresh', name, fpath)
    logger.info("Previous epoch: %d", epoch)
    return epoch


def resume_from_checkpoint(
    fdir: _PathLike, model: nn.Module, optimizer: Optimizer | None = None, scheduler: Any = None
) -> int:
    """Load the checkpoint that ``<fdir>/checkpoint`` names into model, optimizer and scheduler.

    Returns:
        Number of finished epochs, which is the 0-based epoch to start with.

    Raises:
        InputError: nothing to resume there, a file that cannot be read, or one that does not fit.
    """
    path = pointed_file(fdir)
    logger.info('Loading checkpoint from "%s"', path, extra=DETAIL)
    return restore(load_checkpoint(path), path, model, optimizer, scheduler)


def load_pretrained_weights(model: nn.Module, weight_path: _PathLike) -> None:
    """Load those tensors of a file that fit ``model`` by name and shape.

    Args:
        model: changed in place.
        weight_path: a state dict, or a checkpoint with one under ``state_dict``; ``module.`` prefixes are dropped.

    Raises:
        InputError: not one tensor fits, so that nothing would have been loaded.
    """
    checkpoint = load_checkpoint(weight_path)
    if isinstance(checkpoint, Mapping) and "state_dict" in checkpoint:
        checkpoint = checkpoint["state_dict"]
    if not isinstance(checkpoint, Mapping):
        raise InputError(f'Expected "{weight_path}" to hold a state dict but got {type(checkpoint).__name__}')
    weights = _without_module(checkpoint)
    own = model.state_dict()
    matched = {
        name: tensor
        for name, tensor in weights.items()
        if isinstance(tensor, torch.Tensor) and name in own and own[name].shape == tensor.shape
    }
    discarded = [name for name in weights if name not in matched]
    if not matched:
        raise InputError(
            f'Expected "{weight_path}" to have tensors with the names and shapes of the model '
            f"(such as {_first(own)}) but none of its {len(weights)} fits (such as {_first(weights)})"
        )
    model.load_state_dict({**own, **matched})
    logger.info('Loaded %d of %d tensors from "%s"', len(matched), len(own), weight_path)
    if discarded:
        logger.warning("Discarded, for want of the same name and shape in the model: %s", ", ".join(discarded))


def _first(names: Iterable[str], count: int = 3) -> str:
    return ", ".join(list(names)[:count]) or "nothing"

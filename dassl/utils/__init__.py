"""Helpers that trainers, datasets and the engine share.

A name is imported when it is first asked for: some of their modules need torch, which takes seconds to import, and a
command line that is asked for help, or that was mistyped, answers without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import load_checkpoint, load_pretrained_weights, resume_from_checkpoint, save_checkpoint
    from .errors import InputError, UnknownNameError
    from .files import atomic_write
    from .logger import Logger, close_logger, note_in_log, setup_logger, take_log_name
    from .meters import AverageMeter, MetricMeter
    from .registry import Registry
    from .text import one_line, place_name
    from .tools import (
        check_availability,
        check_isfile,
        collect_env_info,
        did_you_mean,
        download_url,
        get_most_similar_str_to_a_from_b,
        listdir_nohidden,
        mkdir_if_missing,
        read_image,
        read_json,
        set_random_seed,
        tolist_if_not,
        write_json,
    )
    from .torchtools import count_num_param, init_network_weights, open_all_layers, open_specified_layers

__all__ = [
    "AverageMeter",
    "InputError",
    "Logger",
    "MetricMeter",
    "Registry",
    "UnknownNameError",
    "atomic_write",
    "check_availability",
    "check_isfile",
    "close_logger",
    "collect_env_info",
    "count_num_param",
    "did_you_mean",
    "download_url",
    "get_most_similar_str_to_a_from_b",
    "init_network_weights",
    "listdir_nohidden",
    "load_checkpoint",
    "load_pretrained_weights",
    "mkdir_if_missing",
    "note_in_log",
    "one_line",
    "place_name",
    "open_all_layers",
    "open_specified_layers",
    "read_image",
    "read_json",
    "resume_from_checkpoint",
    "save_checkpoint",
    "set_random_seed",
    "setup_logger",
    "take_log_name",
    "tolist_if_not",
    "write_json",
]

# Name -> the module that has it; the same as the imports above, which only type checkers read.
_HOME = {
    "InputError": "errors",
    "UnknownNameError": "errors",
    "atomic_write": "files",
    "Logger": "logger",
    "close_logger": "logger",
    "note_in_log": "logger",
    "setup_logger": "logger",
    "take_log_name": "logger",
    "AverageMeter": "meters",
    "MetricMeter": "meters",
    "Registry": "registry",
    "one_line": "text",
    "place_name": "text",
    "check_availability": "tools",
    "check_isfile": "tools",
    "collect_env_info": "tools",
    "did_you_mean": "tools",
    "download_url": "tools",
    "get_most_similar_str_to_a_from_b": "tools",
    "listdir_nohidden": "tools",
    "mkdir_if_missing": "tools",
    "read_image": "tools",
    "read_json": "tools",
    "set_random_seed": "tools",
    "tolist_if_not": "tools",
    "write_json": "tools",
    "count_num_param": "torchtools",
    "init_network_weights": "torchtools",
    "load_checkpoint": "checkpoints",
    "load_pretrained_weights": "checkpoints",
    "open_all_layers": "torchtools",
    "open_specified_layers": "torchtools",
    "resume_from_checkpoint": "checkpoints",
    "save_checkpoint": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name in _HOME.values():
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

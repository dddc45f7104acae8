"""Helpers that trainers, datasets and the engine share."""

from .errors import InputError, UnknownNameError
from .files import atomic_write
from .logger import Logger, close_logger, note_in_log, setup_logger, take_log_name
from .meters import AverageMeter, MetricMeter
from .registry import Registry
from .text import one_line
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
from .torchtools import (
    count_num_param,
    init_network_weights,
    load_checkpoint,
    load_pretrained_weights,
    open_all_layers,
    open_specified_layers,
    resume_from_checkpoint,
    save_checkpoint,
)
from .trouble import RunStoppedError, explain_trouble

__all__ = [
    "AverageMeter",
    "InputError",
    "Logger",
    "MetricMeter",
    "Registry",
    "RunStoppedError",
    "UnknownNameError",
    "atomic_write",
    "check_availability",
    "check_isfile",
    "close_logger",
    "collect_env_info",
    "count_num_param",
    "did_you_mean",
    "download_url",
    "explain_trouble",
    "get_most_similar_str_to_a_from_b",
    "init_network_weights",
    "listdir_nohidden",
    "load_checkpoint",
    "load_pretrained_weights",
    "mkdir_if_missing",
    "note_in_log",
    "one_line",
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

"""Say which formats a method has, and why it lacks the others."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dassl.utils import InputError, did_you_mean

from ...base.transductive import TransductiveTrainer

FORMATS = ("onnx", "torchscript", "openclip", "peft")
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime")}  # beside what is required
SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "openclip": "_openclip", "peft": "_peft"}
FOLDERS = ("openclip", "peft")  # formats that are folders

State = dict[str, Tensor]  # an open_clip state dict


class ExportError(RuntimeError):
    """Tell that a model could not be exported, or that the exported one differs; what was given is not wrong."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; torch's messages may hold a whole graph."""
    return next(iter(str(error).strip().splitlines()), "")[:300]


def merge_nothing(trainer: Any, state: State) -> Tensor:
    """Return the class features [C, E] of zero-shot CLIP, whose weights stay as they are."""
    return trainer.network.learner.zeroshot


def merge_ensemble(trainer: Any, state: State) -> Tensor:
    """Return the class features [C, E] of an ensemble of prompts; CLIP's weights stay as they are."""
    return trainer.network.learner.weights


def merge_projection(trainer: Any, state: State) -> Tensor:
    """Put ProLIP's matrix in the place of the image encoder's last one; return the class features [C, E]."""
    learner = trainer.network.learner
    matrix = learner.matrix.float()
    if "visual.proj" in state:
        state["visual.proj"] = matrix
    else:
        state["visual.attnpool.c_proj.weight"] = matrix.t()
    return learner.zeroshot


def merge_low_rank(trainer: Any, state: State) -> Tensor:
    """Add CLIP-LoRA's updates to the projections of both encoders; return the class features [C, E].

    An update of x is scale * B A x, so that scale * B A is added to the projection's weight.
    """
    learner = trainer.network.learner
    for prefix, updates in (("visual.transformer", learner.visual), ("transformer", learner.text)):
        for number, of in updates.items():
            name = f"{prefix}.resblocks.{int(number) - 1}.attn.in_proj_weight"
            added = [of[which].scale * of[which].B @ of[which].A for which in ("q", "k", "v")]
            state[name] = state[name] + torch.cat(added)
    return trainer.network.text_features()


# Methods whose result is a plain CLIP -> what writes it into CLIP's weights (in place) and returns the class features.
PLAIN: dict[str, Callable[[Any, State], Tensor]] = {
    "CLIPLoRA": merge_low_rank,
    "ProLIP": merge_projection,
    "ZeroshotCLIP": merge_nothing,
    "ZeroshotCLIP2": merge_ensemble,
}


def why_not(method: type, format: str) -> str:
    """Return why a method has no export in a format, as the end of a sentence; "": it has one.

    Args:
        method: the class of a registered trainer.
        format: one of FORMATS.
    """
    if issubclass(method, TransductiveTrainer):
        return "it classifies all images together, so that there is no probability of a single image"
    if format == "openclip" and method.__name__ not in PLAIN:
        return "its result is more than a CLIP with other weights"
    if format == "peft" and method.__name__ != "CLIPLoRA":
        return "what it learns is no low-rank update"
    return ""


def formats_of(method: type) -> tuple[str, ...]:
    """Return the formats that a method can be exported to."""
    return tuple(format for format in FORMATS if not why_not(method, format))


def check_format(format: str, name: str, method: type) -> None:
    """Check that a method can be exported to a format, and that the packages for it are there.

    Raises:
        InputError: it cannot be; the message says why, and which formats the method has.
    """
    check_known(format)
    reason = why_not(method, format)
    if reason:
        has = ", ".join(formats_of(method)) or "none"
        raise InputError(f"Expected a format that {name} has ({has}) but got {format}: {reason}")
    needed = PACKAGES.get(format, ())
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(
            f"Expected the packages {', '.join(needed)} for the format {format} but {', '.join(missing)} "
            'is not installed: pip install "dlr-clip[export]"'
        )


def check_known(format: str) -> None:
    """Check that there is such a format.

    Raises:
        InputError: there is none.
    """
    if format not in FORMATS:
        hint = did_you_mean(str(format), FORMATS)
        raise InputError(f"Expected format to be one of {', '.join(FORMATS)} but got {format!r}{hint}")


def class_features(features: Tensor) -> Tensor:
    """Return class features [C, E] of length 1, fp32, on the CPU."""
    return F.normalize(features.detach().float().cpu(), dim=-1).contiguous()

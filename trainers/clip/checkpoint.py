"""Read CLIP checkpoints of every form in circulation, admitting nothing but tensors.

Forms: safetensors; a torch file holding a state dict (bare, or under "state_dict" as open_clip's training saves it);
OpenAI's TorchScript archive, from which only the state dict is taken; Hugging Face's `CLIPModel`, a folder or a file.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor

from .hugging_face import as_open_clip, is_hugging_face, weights_file

_SHOWN = 3  # how many offending keys an error lists


def checkpoint_form(path: Path) -> str:
    """Tell which form a checkpoint file has: "safetensors", "torchscript" or "torch".

    Only the file's first bytes and its zip listing are read. Of a folder that Hugging Face has written, the file of
    weights counts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has none of these forms.
    """
    path = weights_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected the checkpoint {path} to be a file, but there is none")
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ValueError(f"Expected {path} to be a whole checkpoint but got: {_first_line(error)}") from error
        # Both are zips with a data.pkl; a TorchScript archive also carries its program.
        if any(name.endswith("/constants.pkl") for name in names) or any("/code/" in name for name in names):
            return "torchscript"
        if any(name.endswith("/data.pkl") for name in names):
            return "torch"
    else:
        with path.open("rb") as file:
            head = file.read(9)
        if len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
            return "safetensors"
        if head[:1] == b"\x80":  # torch's format before 1.6: bare pickles, read under the same tensors-only rules
            return "torch"
    raise ValueError(
        f"Expected {path} to be a .safetensors file, a torch state dict or an OpenAI CLIP archive, but got neither"
    )


def read_checkpoint(path: Path, plain: bool = True) -> dict[str, Tensor]:
    """Read a checkpoint's state dict onto the CPU, with keys as ``open_clip.CLIP`` names them.

    Args:
        path: the file, or a folder that Hugging Face has written.
        plain: whether the file is that of an ``open_clip.CLIP``; else its keys stay as they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint, is damaged, or holds anything but tensors where tensors belong.
    """
    content = read_content(path)
    return clean_state(content, path) if plain else unwrapped_state(content, path)


def read_content(path: Path) -> Any:
    """Read what a checkpoint file of any of these forms holds, tensors onto the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no checkpoint, is damaged, or holds more than tensors and plain values.
    """
    form = checkpoint_form(path)
    path = weights_file(path)
    try:
        if form == "safetensors":
            content: Any = load_file(path)
        elif form == "torchscript":
            content = _read_torchscript(path)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected pickle protocol")  # comes with a refusal
                content = torch.load(path, map_location="cpu", weights_only=True)
        return content
    except pickle.UnpicklingError as error:  # torch's text advises to load the file unsafely: it is not repeated
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"it asks for {wanted.group(1)}" if wanted else "its pickle is damaged or holds other things"
        raise ValueError(f"Expected {path} to hold nothing but tensors, but {found}; it was not loaded") from error
    except Exception as error:  # a damaged file can make a parser raise nearly anything
        raise ValueError(f"Expected {path} to be a readable {form} file but got: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def _read_torchscript(path: Path) -> Mapping[str, Tensor]:
    if not hasattr(torch.jit, "load"):
        raise ValueError("a TorchScript archive, which this torch no longer reads; convert it to .safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # nobody can change the files
        warnings.filterwarnings("ignore", category=FutureWarning)
        return torch.jit.load(str(path), map_location="cpu").state_dict()


def unwrapped_state(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict in a loaded checkpoint, under the names that a model without wrappers gives.

    Raises:
        ValueError: there is no state dict, an empty one, or one with a value that is no tensor.
    """
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"Expected {path} to hold a state dict but got {type(content).__name__}")
    other = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"Expected every value in {path} to be a tensor, but {other[0]!r} is not")
    state = {str(key): value for key, value in content.items()}
    if all(key.startswith("module.") for key in state):  # saved from a data-parallel wrapper
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def clean_state(content: Any, path: Path) -> dict[str, Tensor]:
    """Convert a loaded checkpoint to the plain state dict of an ``open_clip.CLIP``: unwrap it and rename its keys.

    Raises:
        ValueError: see `unwrapped_state`.
    """
    state = unwrapped_state(content, path)
    if is_hugging_face(state):
        state = as_open_clip(state)
    state = {key.removeprefix("text."): value for key, value in state.items()}  # open_clip's layout with a text module
    for key in ("input_resolution", "context_length", "vocab_size", "attn_mask"):
        state.pop(key, None)  # OpenAI's bookkeeping; a constant that old open_clip versions stored
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(())
    return state


def build_open_clip(arch: Mapping[str, Any], state: Mapping[str, Tensor], what: str) -> open_clip.CLIP:
    """Build an ``open_clip.CLIP`` in fp32 that holds exactly these weights.

    Parameters are not initialized first, so building costs no time and draws no random numbers.

    Args:
        arch: constructor arguments of ``open_clip.CLIP``.
        state, what: see `fill_model`.

    Raises:
        ValueError: keys or shapes differ from the architecture's.
    """
    with torch.device("meta"):
        model = open_clip.CLIP(**arch)
    return fill_model(model, state, what)


def fill_model(model: Any, state: Mapping[str, Tensor], what: str) -> Any:
    """Let a model hold exactly these weights, in fp32, and return it in eval mode.

    Args:
        model: a module whose parameters may be on the meta device.
        state: tensors by name, in any floating dtype.
        what: what the weights should be and where they come from, for the error.

    Raises:
        ValueError: keys or shapes differ from the model's.
    """
    wanted = model.state_dict()
    state = dict(state)
    for key in wanted:  # a training counter that not every format keeps; unused in eval mode
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, torch.tensor(0))
    missing = [key for key in wanted if key not in state]
    surplus = [key for key in state if key not in wanted]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    faults = [
        f"{len(found)} {label} ({', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''})"
        for label, found in (("missing", missing), ("unknown", surplus), ("of another shape", shapes))
        if found
    ]
    if faults:
        raise ValueError(f"Expected the weights of {what} but got tensors {'; '.join(faults)}")
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, assign=True)
    return model.eval()

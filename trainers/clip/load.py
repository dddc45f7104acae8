"""Load a frozen CLIP by its backbone's name."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg

from .backbones import Backbone, resolve_backbone, shown, weights_hint
from .checkpoint import build_open_clip, checkpoint_form, fill_model, read_checkpoint
from .hugging_face import quick_gelu_of, weights_file
from .model import CLIP, PRECISIONS
from .opaque import build_opaque, build_tokenizer, check_needs, custom_text_state, opaque_towers
from .tiny import IDS, expand_vocabulary, read_record, tiny_files

logger = logging.getLogger(__name__)

_ACTIVATIONS = {True: "quick-GELU", False: "GELU"}
_shared: ContextVar[dict[tuple[str, ...], CLIP] | None] = ContextVar("shared_clips", default=None)


@contextlib.contextmanager
def shared_clips() -> Iterator[None]:
    """Load each CLIP once within this block: runs that follow each other get the same frozen CLIP."""
    outer = _shared.get()
    token = _shared.set({} if outer is None else outer)
    try:
        yield
    finally:
        _shared.reset(token)


def load_clip(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
) -> CLIP:
    """Build a CLIP with its weights, frozen and in eval mode.

    Args:
        name: one of ``BACKBONES`` (OpenAI's quick-GELU models and the bundled "tiny") or
            ``open_clip:<model>/<pretrained tag>``. A model of open_clip whose blocks are not CLIP's is taken as a whole
            (opaque.py).
        weights: a local checkpoint of that architecture (OpenAI's archive or state dict, open_clip's .pt or
            .safetensors, a folder or file of Hugging Face's CLIPModel); for "tiny" the folder or .safetensors file of
            another tiny CLIP; None or "": the backbone's own weights, from the cache or downloaded once.
        precision: "fp32", "fp16", "bf16" (weights cast) or "amp" (fp32 weights; the engine autocasts).
        device: where the model goes.

    Raises:
        ValueError: unknown name or precision; a checkpoint that is damaged, is of another architecture, holds anything
            but tensors, or has the wrong checksum.
        FileNotFoundError: the weights, or a tokenizer, are not here and cannot be fetched; the message says what to
            fetch by hand.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"Expected precision to be one of {', '.join(PRECISIONS)} but got {precision!r}")
    shared, key = _shared.get(), (name, str(weights or ""), precision, str(device))
    if shared is not None and key in shared:
        return shared[key]
    clip = _load(name, weights, precision).to(device)
    if shared is not None:
        shared[key] = clip
    return clip


def _load(name: str, weights: str | os.PathLike[str] | None, precision: str) -> CLIP:
    backbone = resolve_backbone(name)
    if not backbone.has_blocks:
        return _load_whole(backbone, weights, precision)
    known = None
    if name == "tiny":
        record, path = tiny_files(weights or None)
        arch = read_record(record)["arch"]
        stored = read_checkpoint(path)
        state = expand_vocabulary(stored, arch["text_cfg"]["vocab_size"])
        known = frozenset(stored[IDS].tolist())
    else:
        path = Path(weights).expanduser() if weights else _obtain(backbone)
        arch, state = backbone.arch, read_checkpoint(path)
    model = build_open_clip(arch, state, f"{name} in {path}")
    clip = CLIP(model, name, precision, backbone.pixel_mean, backbone.pixel_std)
    clip.known_ids = known
    quick = bool(arch.get("quick_gelu", False))
    logger.info("CLIP %s from %s (%s, %s)", name, path, precision, _ACTIVATIONS[quick])
    if weights and name != "tiny":
        _check_activation(name, path, quick)
    return clip


def _load_whole(backbone: Backbone, weights: str | os.PathLike[str] | None, precision: str) -> CLIP:
    """Load a backbone whose blocks cannot be run; see opaque.py."""
    name, arch = backbone.name, backbone.arch
    check_needs(name, arch)
    tokenizer = build_tokenizer(backbone.model)
    path = Path(weights).expanduser() if weights else _obtain(backbone)
    state = read_checkpoint(path, plain=False)
    model: Any = build_opaque(arch)
    model = fill_model(model, custom_text_state(state, model), f"{name} in {path}")
    towers = opaque_towers(model, arch, tokenizer, precision)
    logger.info("CLIP %s from %s (%s, taken as a whole: %s)", name, path, precision, shown(backbone.foreign))
    return CLIP(model, name, precision, backbone.pixel_mean, backbone.pixel_std, towers)


def _check_activation(name: str, path: Path, quick: bool) -> None:
    """Warn if a file's origin speaks for another activation than the backbone's.

    No tensor tells which activation the weights were trained with, and with the wrong one features would be wrong.
    """
    trained, origin = activation_of_origin(path)
    if trained is not None and trained != quick:
        logger.warning(
            "%s takes %s but %s, so that its weights were trained with %s: choose a MODEL.BACKBONE.NAME with that "
            "activation (OpenAI's names and open_clip's ...-quickgelu have quick-GELU, open_clip's others GELU)",
            name,
            _ACTIVATIONS[quick],
            origin,
            _ACTIVATIONS[trained],
        )


def activation_of_origin(path: Path) -> tuple[bool | None, str]:
    """Return (whether a checkpoint's origin speaks for quick-GELU, a clause that says why).

    Only OpenAI's archives are TorchScript programs. Any other file is known by a tag of open_clip's tables in its path,
    such as "laion2b_s34b_b79k", however the tag is spelled. The first value is None if the origin does not decide.
    """
    stated = quick_gelu_of(weights_file(path))
    if stated is not None:
        return stated, f"the configuration beside {path} says so"
    if checkpoint_form(path) == "torchscript":
        return True, f"{path} is an archive of OpenAI's"
    place = _letters("".join(path.absolute().parts[-4:]))  # the hub's cache has the name three folders above the file
    tags = {tag for _, tag in open_clip.list_pretrained() if len(tag) >= 5 and _letters(tag) in place}
    if not tags:
        return None, ""
    tag = max(tags, key=len)
    kinds = {
        bool(
            get_pretrained_cfg(model, tag).get("quick_gelu")
            or (open_clip.get_model_config(model) or {}).get("quick_gelu")
        )
        for model, its in open_clip.list_pretrained()
        if its == tag
    }
    return kinds.pop() if len(kinds) == 1 else None, f"{path} is called like the weights {tag}"


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _obtain(backbone: Backbone) -> Path:
    """Return the file of the backbone's own weights: from any cache, else from the first source that delivers.

    Raises:
        FileNotFoundError: no source delivers.
    """
    for source in backbone.sources:
        if source.cached() is not None:
            try:
                return source.fetch()  # verifies the checksum
            except OSError as error:
                logger.warning("%s", error)
    failures = []
    for source in backbone.sources:
        try:
            return source.fetch()
        except OSError as error:
            failures.append(str(error).strip().split("\n")[0])
    raise FileNotFoundError(
        f"Expected to fetch the weights of {backbone.name} but got: {'; '.join(failures) or 'no place that has them'}. "
        + (weights_hint(backbone) if backbone.sources else "Set MODEL.BACKBONE.WEIGHTS to a local file.")
    )

"""Look backbones up: which there are, how they are built and who offers their weights."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.pretrained import get_pretrained_cfg

from .checkpoint import checkpoint_form
from .opaque import check_needs
from .sources import HubSource, Source, UrlSource
from .tiny import read_record, tiny_files

OPENAI = ("RN50", "RN101", "ViT-B/32", "ViT-B/16", "ViT-L/14")
BACKBONES = (*OPENAI, "tiny")
OPEN_CLIP_PREFIX = "open_clip:"

_SHOWN = 4  # keys of an architecture that a message names
_VOCABULARY = 49408  # rows of CLIP's byte-pair vocabulary, the only one supported
# The keys of open_clip's architectures whose blocks our towers can run. An architecture with any other key (timm and
# Hugging Face towers, other pooling) is taken as a whole (opaque.py).
_VISION_KEYS = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "ls_init_value", "no_ln_pre",
                "act_kwargs", "norm_kwargs"}  # fmt: skip
_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "ls_init_value", "act_kwargs",
              "norm_kwargs"}  # fmt: skip


@dataclass(frozen=True)
class Backbone:
    """A resolved backbone name.

    Attributes:
        name: as given.
        arch: constructor arguments of ``open_clip.CLIP``; empty for "tiny", whose file carries them. Without blocks,
            open_clip's configuration of the model.
        sources: who offers the weights, in order of preference; empty for "tiny" and where no tag was given.
        pixel_mean, pixel_std: input normalization of these weights.
        interpolation: how images are resized for them.
        squash: whether their authors resize both sides to the model's size instead of cutting out the middle.
        model: open_clip's name of the model; "" for "tiny".
        foreign: what in the architecture is not a plain CLIP's, so that its blocks cannot be run; empty: nothing.
    """

    name: str
    arch: Mapping[str, Any]
    sources: tuple[Source, ...] = ()
    pixel_mean: tuple[float, ...] = OPENAI_DATASET_MEAN
    pixel_std: tuple[float, ...] = OPENAI_DATASET_STD
    interpolation: str = "bicubic"
    squash: bool = False
    model: str = ""
    foreign: tuple[str, ...] = ()

    @property
    def has_blocks(self) -> bool:
        """Say whether methods can run the blocks of the encoders; if not, all they get is features."""
        return not self.foreign


def _did_you_mean(given: str, known: list[str]) -> str:
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(given.lower(), list(by_lower), n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def resolve_backbone(name: str) -> Backbone:
    """Look a backbone up by its name.

    Raises:
        ValueError: the name is unknown; the message says which names are known and which may have been meant.
    """
    if name == "tiny":
        return Backbone(name, {})
    if name in OPENAI:
        return _from_open_clip(name, name.replace("/", "-") + "-quickgelu", "openai", url_first=True)
    if name.startswith(OPEN_CLIP_PREFIX):
        model, _, tag = name.removeprefix(OPEN_CLIP_PREFIX).partition("/")
        return _from_open_clip(name, model, tag, url_first=False)
    raise ValueError(
        f"Expected the backbone to be one of {', '.join(BACKBONES)} or {OPEN_CLIP_PREFIX}<model>/<pretrained tag> "
        f"but got {name!r}{_did_you_mean(name, list(BACKBONES))}"
    )


def is_resnet(name: str) -> bool:
    """Return whether a backbone's image encoder is a ResNet, by its name alone; for errors, see `resolve_backbone`."""
    backbone = resolve_backbone(name)
    return backbone.has_blocks and isinstance(backbone.arch.get("vision_cfg", {}).get("layers"), (list, tuple))


def why_no_blocks(name: str) -> str:
    """Say, by a backbone's name alone, why a method cannot run the blocks of its encoders; "": it can.

    Raises:
        ValueError: the name is unknown.
    """
    foreign = resolve_backbone(name).foreign
    return f"{name!r} has {shown(foreign)}" if foreign else ""


def shown(foreign: Sequence[str]) -> str:
    """Return the first few of what is not a plain CLIP's, as a text."""
    return ", ".join(foreign[:_SHOWN]) + (", ..." if len(foreign) > _SHOWN else "")


def _from_open_clip(name: str, model: str, tag: str, url_first: bool) -> Backbone:
    """Look a backbone up in open_clip's tables.

    Args:
        name: the backbone's name as given.
        model: open_clip's name of the model.
        tag: open_clip's pretrained tag; if it is empty, the weights must be a local file.
        url_first: whether a URL comes before the Hugging Face hub in the order of sources.

    Raises:
        ValueError: the model or the tag is unknown.
    """
    arch = open_clip.get_model_config(model)
    if arch is None:
        hint = _did_you_mean(model, open_clip.list_models())
        raise ValueError(f"Expected {name!r} to name a model that open_clip knows but got {model!r}{hint}")
    pretrained = get_pretrained_cfg(model, tag) if tag else {}
    if tag and not pretrained:
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise ValueError(
            f"Expected {name!r} to name a pretrained tag of {model} ({', '.join(tags) or 'it has none'}) "
            f"but got {tag!r}{_did_you_mean(tag, tags)}"
        )
    foreign = foreign_keys(arch)
    stated = pretrained or (agreed_preprocessing(model) if foreign else {})
    # The activation belongs to the weights: a tag trained with quick-GELU says so whatever the model's file says.
    arch["quick_gelu"] = bool(arch.get("quick_gelu", False) or pretrained.get("quick_gelu", False))
    url, (repo, file) = pretrained.get("url", ""), os.path.split(pretrained.get("hf_hub", ""))
    urls: list[Source] = [UrlSource.from_url(url)] if url else []
    hubs: list[Source] = [HubSource(repo, (file,)) if file else HubSource(repo)] if repo else []
    return Backbone(
        name,
        arch,
        # OpenAI's own files have a published checksum and may already lie in the cache that other programs share;
        # for the rest the hub's safetensors come first.
        sources=tuple(urls + hubs if url_first else hubs + urls),
        pixel_mean=tuple(stated.get("mean", OPENAI_DATASET_MEAN)),
        pixel_std=tuple(stated.get("std", OPENAI_DATASET_STD)),
        interpolation=stated.get("interpolation", "bicubic"),
        squash=stated.get("resize_mode") == "squash",
        model=model,
        foreign=foreign,
    )


def agreed_preprocessing(model: str) -> dict[str, Any]:
    """Return what all pretrained weights of a model have in common in how images are prepared.

    It is what a local file of weights, which has no tag, most likely wants.
    """
    tags = [get_pretrained_cfg(model, tag) for tag in open_clip.list_pretrained_tags_by_model(model)]
    keys = ("mean", "std", "interpolation", "resize_mode")
    return {key: tags[0][key] for key in keys if tags and all(tag.get(key) == tags[0].get(key) for tag in tags)}


def foreign_keys(arch: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what in one of open_clip's architectures is not a plain CLIP's.

    A plain CLIP is a ViT or a ResNet with a causal text transformer and CLIP's vocabulary.
    """
    vision, text = arch.get("vision_cfg", {}), arch.get("text_cfg", {})
    foreign = sorted(set(arch) - {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"})
    foreign += sorted(set(vision) - _VISION_KEYS) + sorted(set(text) - _TEXT_KEYS)
    if not foreign and text.get("vocab_size") != _VOCABULARY:
        foreign = [f"vocab_size {text.get('vocab_size')}"]
    return tuple(foreign)


def weights_hint(backbone: Backbone) -> str:
    """Say in one line what to do if a backbone's weights are neither on this machine nor to be had."""
    places = ", or ".join(source.describe() for source in backbone.sources)
    return f"Fetch {places}; or set MODEL.BACKBONE.WEIGHTS to a file of these weights."


def check_backbone(name: str, weights: str | os.PathLike[str] | None = None) -> None:
    """Check cheaply that ``load_clip(name, weights)`` has a chance, before any long work.

    The check reads no tensors and downloads nothing. If the weights are not on this machine, it asks their servers
    whether they answer (a few seconds at most).

    Args:
        name: one of ``BACKBONES`` or ``open_clip:<model>/<pretrained tag>``.
        weights: local checkpoint, or None or "" for the backbone's own weights.

    Raises:
        ValueError: unknown name, or ``weights`` is no checkpoint.
        FileNotFoundError: a file that is needed is not there and cannot be fetched; the message says which file to
            fetch, from where, its checksum, and where to put it.
    """
    backbone = resolve_backbone(name)
    if name == "tiny":
        record, tensors = tiny_files(weights or None)
        read_record(record)
        checkpoint_form(tensors)
    elif weights:
        checkpoint_form(Path(weights).expanduser())
    elif not backbone.sources:
        raise ValueError(
            f"Expected {name!r} to have a pretrained tag ({OPEN_CLIP_PREFIX}<model>/<tag>) or MODEL.BACKBONE.WEIGHTS "
            "to be set, but got neither"
        )
    elif not any(source.cached() for source in backbone.sources) and not any(s.reachable() for s in backbone.sources):
        raise FileNotFoundError(
            f"Expected the weights of {name} on this machine or a network to fetch them, but got neither. "
            + weights_hint(backbone)
        )
    if not backbone.has_blocks:
        check_needs(name, backbone.arch)

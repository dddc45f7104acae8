"""Take a CLIP whose blocks are not CLIP's as a whole: images and texts go in, features come out.

open_clip builds the model and its tokenizer, so that every architecture of its list can be taken: SigLIP, EVA, CoCa,
image encoders of timm, text encoders of Hugging Face. Methods on features work with them as with any CLIP. Methods that
change what happens inside the encoders do not: for them, `has_blocks` of a backbone says so before weights are loaded.

Legend: B images, N prompts, S side length of images, E joint embedding, L tokens that a prompt may have.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import open_clip
import torch
from torch import Tensor, nn

from .edits import BlockEdit, Edits
from .sources import HubSource, offline
from .text import PromptTokens, TextTower
from .vision import VisionTower

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_CONFIG_FILES = ("config.json",)


def check_needs(name: str, arch: Mapping[str, Any]) -> None:
    """Check that all that a model needs beside its weights is on this machine, or can be fetched; nothing is loaded.

    A tokenizer, and the architecture of a text encoder, may lie on the Hugging Face hub.

    Args:
        name: the backbone's name, for messages.
        arch: open_clip's configuration of the model.

    Raises:
        ValueError: the package transformers is missing.
        FileNotFoundError: a file is neither here nor to be had.
    """
    text = arch["text_cfg"]
    needed = {
        "the tokenizer": (text.get("hf_tokenizer_name"), _TOKENIZER_FILES),
        "the configuration of the text encoder": (text.get("hf_model_name"), _CONFIG_FILES),
    }
    wanted = {what: (place, files) for what, (place, files) in needed.items() if place}
    if wanted and importlib.util.find_spec("transformers") is None:
        raise ValueError(
            f"Expected the package transformers, which {' and '.join(wanted)} of {name} need, but it is not "
            "installed: pip install 'dlr-clip[transformers]'"
        )
    for what, (place, files) in wanted.items():
        if Path(place).exists():
            continue
        source = HubSource(place, files)
        if source.cached() is None and not source.reachable():
            why = "network access is switched off (HF_HUB_OFFLINE)" if offline() else "the hub does not answer"
            raise FileNotFoundError(
                f"Expected {what} of {name} in the cache of the Hugging Face hub, or a network to fetch it, but got "
                f"neither ({why}). Fetch it on a machine with a network, by: hf download {place} {' '.join(files)}"
            )


def build_opaque(arch: Mapping[str, Any]) -> nn.Module:
    """Build open_clip's model with its text encoder in a module of its own, in fp32, with random weights.

    Nothing is downloaded but the architecture of a Hugging Face text encoder. The program's random numbers stay as they
    are. (Without the memory of a real device, buffers that no file of weights has would be lost.)

    Args:
        arch: open_clip's configuration of the model.
    """
    arguments = {key: value for key, value in arch.items() if key != "custom_text"}
    arguments["vision_cfg"] = {**arch["vision_cfg"], "timm_model_pretrained": False}
    arguments["text_cfg"] = {**arch["text_cfg"], "hf_model_pretrained": False}
    kind: Any = open_clip.CoCa if "multimodal_cfg" in arch else open_clip.CustomTextCLIP
    with torch.random.fork_rng(devices=[]):
        return kind(**arguments)


def custom_text_state(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict with the names of a model whose text encoder is a module of its own.

    In files of models without one, the text encoder's tensors lie beside that module.
    """
    wanted = model.state_dict()
    return {
        name if name in wanted or f"text.{name}" not in wanted else f"text.{name}": value
        for name, value in state.items()
        if name not in ("attn_mask", "text.attn_mask", "text.transformer.embeddings.position_ids") or name in wanted
    }


def build_tokenizer(model: str) -> Any:
    """Build open_clip's tokenizer of a model, which makes token ids [N, L] of N texts.

    Args:
        model: open_clip's name of the model.

    Raises:
        ValueError: the tokenizer cannot be loaded.
    """
    try:
        with _no_new_handlers():
            return open_clip.get_tokenizer(model)
    except Exception as error:  # transformers raises nearly anything on a file that is damaged or lacks a package
        first = next(iter(str(error).strip().splitlines()), "")[:300]
        raise ValueError(
            f"Expected the tokenizer of open_clip's {model} to load but got {type(error).__name__}: {first}"
        ) from error


@contextlib.contextmanager
def _no_new_handlers() -> Iterator[None]:
    """Keep open_clip, which logs by the root logger, from giving that logger a handler."""
    root = logging.getLogger()
    before = list(root.handlers)
    try:
        yield
    finally:
        for handler in [one for one in root.handlers if one not in before]:
            root.removeHandler(handler)


def opaque_towers(
    model: Any, arch: Mapping[str, Any], tokenizer: Any, precision: str = "fp32"
) -> tuple[VisionTower, TextTower]:
    """Return the image tower and the text tower of a model that is taken as a whole.

    Args:
        model: from `build_opaque`, with its weights.
        arch: what it was built of.
        tokenizer: from `build_tokenizer`.
        precision: as for CLIP. "fp16" and "bf16" keep the weights in fp32, and compute in that precision.
    """
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    return OpaqueVision(model.visual, arch, dtype), OpaqueText(model.text, arch, tokenizer, dtype)


def _computed(module: nn.Module, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Run one of open_clip's encoders, under autocast where a dtype is given, and return its features alone."""
    with torch.autocast(x.device.type, dtype=dtype) if dtype else contextlib.nullcontext():
        out = module(x)
    return out[0] if isinstance(out, tuple) else out  # CoCa's give their tokens beside


class OpaqueVision(VisionTower):
    """An image encoder that is one block, in which nothing can be changed.

    The block takes images, [B, 3, S, S], and gives their features, [B, E].
    """

    kind = "opaque"

    def __init__(self, visual: nn.Module, arch: Mapping[str, Any], dtype: torch.dtype | None) -> None:
        """Take over an image encoder of open_clip.

        Args:
            visual: the encoder.
            arch: the configuration of its model.
            dtype: what is computed in; None: the weights' own.

        Raises:
            ValueError: the encoder takes images that are not square.
        """
        super().__init__()
        size = arch["vision_cfg"]["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            raise ValueError(f"Expected an image encoder that takes square images but got {height} x {width} pixels")
        self.visual = visual
        self.depth = 1
        self.widths, self.adaptable = {}, ()
        self.image_size = int(height)
        self.embed_dim = self.pooled_dim = int(arch["embed_dim"])
        self._computes = dtype
        # The weights do not tell the architecture, and others' code runs it.
        facts = {"vision_cfg": arch["vision_cfg"], "quick_gelu": bool(arch.get("quick_gelu", False))}
        versions = [f"open_clip {open_clip.__version__}", f"timm {importlib.metadata.version('timm')}"]
        self.form = json.dumps([facts, versions], sort_keys=True)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.visual.parameters()).dtype

    def check_edits(self, edits: Sequence[BlockEdit], method: str = "") -> Edits:
        if edits:
            _refuse(method or "these edits")
        return super().check_edits(edits, method)

    def _stem(self, images: Tensor, edits: Edits) -> Tensor:
        return images

    def _plain(self, number: int, hidden: Tensor, edits: Edits, read: int) -> tuple[Tensor, Tensor]:
        out = _computed(self.visual, hidden, self._computes)
        return out, out

    def _pool(self, hidden: Tensor, edits: Edits) -> Tensor:
        return hidden

    def _project(self, pooled: Tensor) -> Tensor:
        return pooled

    def mean_patch(self, hidden: Tensor) -> Tensor:
        _refuse("the patches of images")

    def pooled(self, images: Tensor) -> Tensor:
        _refuse("features before the projection")

    def projection(self) -> tuple[Tensor, Tensor | None]:
        _refuse("its last matrix")


class OpaqueText(TextTower):
    """A text encoder with a tokenizer of its own, none of whose blocks can be run by itself."""

    def __init__(self, text: nn.Module, arch: Mapping[str, Any], tokenizer: Any, dtype: torch.dtype | None) -> None:
        """Take over a text encoder of open_clip.

        Args:
            text: the encoder.
            arch: the configuration of its model.
            tokenizer: makes token ids [N, L] of N texts.
            dtype: what is computed in; None: the weights' own.
        """
        nn.Module.__init__(self)
        self.text = text
        self.tokenizer = tokenizer
        self.context_length = int(tokenizer.context_length)
        self.embed_dim = int(arch["embed_dim"])
        self._computes = dtype

    @property
    def dtype(self) -> torch.dtype:
        return next(self.text.parameters()).dtype

    def tokenise(self, prompts: Sequence[str]) -> PromptTokens:
        """Refuse, as tokens without blocks are of no use.

        Raises:
            ValueError: always.
        """
        _refuse("tokens")

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """Return the token ids [N, L] of N prompts, padded and cut as open_clip's tokenizer does.

        Cut prompts are warned of.

        Raises:
            ValueError: ``prompts`` is empty, or one text instead of a list.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"Expected prompts to be a non-empty list of strings but got {prompts!r}")
        ids = self.tokenizer(list(prompts))
        whole = self.tokenizer(list(prompts), context_length=2 * self.context_length)
        cut = (whole[:, : self.context_length] != ids).any(dim=1).nonzero().flatten().tolist()  # they end otherwise
        if cut:
            logger.warning(
                "%d prompts of more than %d tokens are cut, such as %r", len(cut), self.context_length, prompts[cut[0]]
            )
        return ids.to(next(self.text.parameters()).device)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Return text features [N, E], not normalized, for N prompts."""
        return _computed(self.text, self.ids(prompts), self._computes)


def _refuse(what: str) -> NoReturn:
    """Say that a tower has no blocks.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"Expected a plain CLIP for {what} but the model is taken as a whole, without its blocks")

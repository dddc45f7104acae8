"""Read and write adapters that correct intra-modal overlap, and encode images with them beside CLIP.

The adapters themselves are in ../modules/overlap_adapters.py; the trainers IMO and IMODINO make them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..clip import CLIP
from ..files import write_bytes
from ..modules.overlap_adapters import IMOAdapters, _digest
from .encoder import ImageEncoder

FILE_NAME = "imo_adapters.safetensors"  # in the output folder of a run
FORMAT = "imo-adapters-2"
FORMATS = ("imo-adapters-1", FORMAT)  # files of the first do not name a form: theirs is "after"


def save_adapters(path: str | os.PathLike[str], adapters: IMOAdapters, clip: CLIP, recipe: Mapping[str, Any]) -> None:
    """Write the adapters and how they were made as safetensors, at once or not at all.

    Args:
        recipe: plain values (trainer, config, data digest, ...); which CLIP the adapters fit is added.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in adapters.state_dict().items()}
    facts = {
        "format": FORMAT,
        "backbone": clip.name,
        "weights_digest": clip.weights_digest,
        "dim": adapters.dim,
        **adapters.made_as,
        "widths": {str(i): width for i, width in adapters.widths.items()},
        "digest": _digest(state),
    }
    write_bytes(path, safetensors_bytes(state, metadata={"recipe": json.dumps({**recipe, **facts}, sort_keys=True)}))


def find_adapters(path: str | os.PathLike[str]) -> Path:
    """Find the adapters' file: `path` itself, or the file in the run folder `path`.

    Raises:
        FileNotFoundError: there is none.
    """
    given = Path(path).expanduser()
    file = given / FILE_NAME if given.is_dir() else given
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected MODEL.IMO_WEIGHTS to be a file of adapters, or the output folder of IMO or IMODINO with its "
            f"{FILE_NAME}, but there is no {file}"
        )
    return file


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read how the adapters of a file were made, and which CLIP they fit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no such adapters.
    """
    file = find_adapters(path)
    try:
        with safe_open(str(file), framework="pt") as opened:
            recipe = json.loads((opened.metadata() or {}).get("recipe", "{}"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"Expected {file} to be a safetensors file of adapters but got: {error}") from error
    if not isinstance(recipe, dict) or recipe.get("format") not in FORMATS:
        raise ValueError(f"Expected {file} to hold adapters that IMO or IMODINO saved but got tensors without a recipe")
    return recipe


def check_adapters(path: str | os.PathLike[str], backbone: str) -> None:
    """Check that a file holds adapters for a backbone of that name, before CLIP is loaded; see `read_recipe`."""
    made_for = read_recipe(path)["backbone"]
    if made_for != backbone:
        raise ValueError(f"Expected adapters (MODEL.IMO_WEIGHTS) for backbone {backbone} but got some for {made_for}")


def load_adapters(path: str | os.PathLike[str], clip: CLIP) -> IMOAdapters:
    """Load adapters from a file (or run folder), frozen, on CLIP's device.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no adapters, is damaged, or was made for another CLIP.
    """
    recipe, file = read_recipe(path), find_adapters(path)
    widths = {int(i): width for i, width in recipe["widths"].items()}
    for what, got, ours in (
        ("blocks of widths", widths, dict(clip.visual.widths)),
        (f"{clip.name} with weights of sha256", recipe["weights_digest"], clip.weights_digest),
    ):
        if got != ours:
            raise ValueError(f"Expected adapters (MODEL.IMO_WEIGHTS) for {what} {ours} but {file} is for {got}")
    adapters = IMOAdapters(widths, recipe["dim"])
    adapters.take_form(recipe)
    with safe_open(str(file), framework="pt") as opened:
        state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
    own = {name: value.shape for name, value in adapters.state_dict().items()}
    if {name: value.shape for name, value in state.items()} != own or _digest(state) != recipe["digest"]:
        raise ValueError(f"Expected {file} to hold the tensors that its recipe describes but they differ")
    adapters.load_state_dict(state)
    return adapters.requires_grad_(False).to(clip.device).eval()


class CorrectedEncoder(ImageEncoder):
    """Encode images by the frozen CLIP and, beside these features, by CLIP with adapters.

    Args:
        clip, precision, autocast: see ImageEncoder.
        adapters: the adapters, on CLIP's device.
    """

    parts = 2

    def __init__(self, clip: CLIP, precision: str, autocast: Callable[[], Any], adapters: IMOAdapters) -> None:
        super().__init__(clip, precision, autocast)
        self.adapters = adapters

    @property
    def weights_digest(self) -> str:
        """The digests of CLIP's weights and of the adapters."""
        return f"{self.clip.weights_digest}+{self.adapters.digest()}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return original and corrected features [B, 2E] of images [B, 3, H, W].

        They are fp32; if `unit`, each half is L2-normalized.
        """
        original = super().__call__(images)
        with self.autocast():
            corrected = self.adapters.encode(self.clip, images.to(self.clip.device), unit=self.unit)
        return torch.cat([original, corrected], dim=-1)

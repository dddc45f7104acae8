"""Encode images by a model of torchvision beside CLIP.

The model's weights are a file of the user's: of torchvision, or of a self-supervised training with the same layers,
such as MoCo v3. The model's last linear layer is taken out, and what enters it are the features.

Legend: B images, E width of the joint embedding, A width of the auxiliary features.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from ..clip import CLIP
from ..clip.checkpoint import read_content
from ..modules.overlap_adapters import _digest
from .encoder import ImageEncoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pixels that torchvision's models are trained on


def check_auxiliary(name: str, path: str | os.PathLike[str]) -> None:
    """Check that torchvision has a model of that name, and that there is a file, before anything is loaded.

    Raises:
        ValueError: there is no such model.
        FileNotFoundError: there is no such file.
    """
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(
            f"Expected the auxiliary model to be one of torchvision's {len(known)}, such as resnet50 or vit_b_16, "
            f"but got {name!r}"
        )
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(f"Expected a file with the weights of {name} but there is no {path}")


def without_last_layer(name: str) -> tuple[nn.Module, int]:
    """Build a model of torchvision whose last linear layer is taken out, and return it with the width A.

    Raises:
        ValueError: the model has no linear layer.
    """
    with torch.random.fork_rng(devices=[]):  # its random weights are replaced: they draw nothing from the program's
        model = models.get_model(name, weights=None)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"Expected an auxiliary model with a linear layer at its end but {name} has none")
    parent, _, last = linear[-1].rpartition(".")
    width = int(model.get_submodule(linear[-1]).in_features)
    setattr(model.get_submodule(parent), last, nn.Identity())
    return model.eval().requires_grad_(False), width


def fitting_state(content: Any, wanted: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint that a model needs.

    A checkpoint is a state dict, or has some inside, such as "state_dict" or "model". The names in there may begin with
    words of their own, such as "module.base_encoder.". Of several places that fit, the first one in the file counts.

    Args:
        content: the checkpoint.
        wanted: the model's own state dict.
        what: what the weights should be and where they come from, for the error.

    Raises:
        ValueError: there is no such place.
    """
    listed = (content, *content.values()) if isinstance(content, Mapping) else ()
    inside = [one for one in listed if isinstance(one, Mapping)]
    mark, lacking = next(iter(wanted)), list(wanted)
    for state in inside:
        names = [str(name) for name in state if str(name).endswith(mark)]
        for prefix in (name.removesuffix(mark) for name in names):
            found: dict[str, Tensor] = {}
            for name, own in wanted.items():
                value = state.get(prefix + name)
                if value is None and name.endswith("num_batches_tracked"):
                    value = own  # a counter of training steps, which not every format keeps
                if isinstance(value, Tensor) and value.shape == own.shape:
                    found[name] = value
            lacks = [name for name in wanted if name not in found]
            if not lacks:
                return found
            lacking = min(lacking, lacks, key=len)
    raise ValueError(
        f"Expected {what} but {len(lacking)} of {len(wanted)} tensors are not there, or of another shape, such as "
        f"{lacking[0]} {tuple(wanted[lacking[0]].shape)}"
    )


class AuxiliaryEncoder(ImageEncoder):
    """Encode images by the frozen CLIP and, beside these features, by a frozen model of torchvision.

    Args:
        clip, precision, autocast: see ImageEncoder. The model computes in fp32.
        name: the model's name in torchvision.
        path: file of its weights.
        mean, std: what images were normalized with for CLIP; the model gets them as torchvision's models want them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold such weights, or the model takes no images of CLIP's size.
    """

    parts = 2
    unit = False

    def __init__(
        self,
        clip: CLIP,
        precision: str,
        autocast: Callable[[], Any],
        name: str,
        path: str | os.PathLike[str],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(clip, precision, autocast)
        model, self.auxiliary_width = without_last_layer(name)
        file = Path(path).expanduser()
        state = fitting_state(read_content(file), model.state_dict(), f"{file} to hold the weights of {name}")
        model.load_state_dict(state)
        self.name = name
        self.model = model.float().to(clip.device)
        self.digest = _digest({key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()})
        given, wanted = (torch.tensor(pair, device=clip.device)[..., None, None] for pair in ((mean, std), (MEAN, STD)))
        self.scale, self.shift = given[1] / wanted[1], (given[0] - wanted[0]) / wanted[1]
        try:
            width = self.auxiliary(torch.zeros(1, 3, clip.image_size, clip.image_size)).shape[1:]
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(
                f"Expected an auxiliary model that takes images of {clip.image_size} pixels, as {clip.name} does, but "
                f"{name} says: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        if tuple(width) != (self.auxiliary_width,):
            raise ValueError(
                f"Expected an auxiliary model that ends in its linear layer, of {self.auxiliary_width} inputs, but "
                f"{name} gives features of shape {tuple(width)}"
            )

    @property
    def width(self) -> int:
        """E + A."""
        return self.clip.embed_dim + self.auxiliary_width

    @property
    def weights_digest(self) -> str:
        """The digests of CLIP's weights and of the model's, and the model's name."""
        return f"{self.clip.weights_digest}+{self.name}:{self.digest}"

    @torch.no_grad()
    def auxiliary(self, images: Tensor) -> Tensor:
        """Return the model's features [B, A] of images [B, 3, H, W] that were normalized for CLIP."""
        with torch.autocast(device_type=self.clip.device.type, enabled=False):
            return self.model(images.to(self.clip.device).float() * self.scale + self.shift)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return CLIP's features and the model's, [B, E + A], fp32, with their lengths, of images [B, 3, H, W]."""
        return torch.cat([super().__call__(images), self.auxiliary(images)], dim=-1)

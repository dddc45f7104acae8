"""The adapters that correct CLIP's image features for being compared with each other.

    beside   out = x' + mlp(ln_2(x')) + s up( relu( down(x') ) )     x' what enters a block's MLP: the authors' code
    after    out = h + up( gelu( down(h) ) )                         h the output of a visual block: ours

Both map D -> r -> D, and `up` starts at zero. s is a fixed number, 0.03 with labels and 0.1 with DINO. On ResNets,
which the authors do not have, both see h.

CLIP is trained across modalities, so the cosine similarities of images of one class overlap those of images of two
classes. The adapters are trained once on a generic image set, with CLIP frozen, and serve every method that compares
images.

Legend: B images, N tokens, D width of a block, r bottleneck width, E joint embedding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clip import CLIP, BlockEdit

FORMS = ("beside", "after")


class Dropout:
    """Drop entries of a batch in training; a seed and an image's place in the whole batch decide which ones.

    Args:
        share: share of the entries that are dropped, in [0, 1); the others are enlarged to keep the mean.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.rank, self.world = 0, 1
        self.generator: torch.Generator | None = None  # None: torch's own

    def seed(self, seed: int, device: torch.device, rank: int, world: int) -> None:
        """Seed the dropout of a process.

        Process `rank` of `world` has every world-th image, and drops the entries that one process would drop of them.
        """
        if self.generator is None or self.generator.device != device:
            self.generator = torch.Generator(device)
        self.generator.manual_seed(seed)
        self.rank, self.world = rank, world

    def __call__(self, h: Tensor) -> Tensor:
        """Return h [B, ...] with the dropped entries at zero."""
        if not self.share:
            return h
        whole = torch.rand(len(h) * self.world, *h.shape[1:], device=h.device, generator=self.generator)
        return h * (whole[self.rank :: self.world] >= self.share) / (1 - self.share)


class Bottleneck(nn.Module):
    """The bottleneck s up(relu(down h)) or up(gelu(down h)) of a block; it gives zero until `up` has been trained.

    Args:
        width: D. dim: r. form: see IMOAdapters.
    """

    def __init__(self, width: int, dim: int, form: str) -> None:
        super().__init__()
        self.down = nn.Linear(width, dim)
        self.up = nn.Linear(dim, width)
        if form == "beside":
            nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor, form: str, scale: float, dropout: Dropout | None) -> Tensor:
        """Return the bottleneck's output [B, ..., D] for h [B, ..., D], in fp32 whatever the backbone's precision."""
        with torch.autocast(device_type=h.device.type, enabled=False):
            inner = self.down(h.float())
            inner = F.relu(inner) if form == "beside" else F.gelu(inner)
            out = self.up(inner if dropout is None else dropout(inner))
            return scale * out if form == "beside" else out


class IMOAdapters(BlockEdit, nn.Module):
    """Edit every visual block by a bottleneck of its own, beside the MLP or after the block.

    Args:
        widths: width D of each block, by its number (from 1).
        dim: r.
        form: "beside" or "after", see the head of this file.
        scale: s, for the form "beside"; any finite number.
        dropout: share of the inner entries that are dropped in training, in [0, 1); source: 0.1 with labels.

    Raises:
        ValueError: no block, r below 1, another form, or a scale that is no finite number.
    """

    def __init__(
        self,
        widths: Mapping[int, int],
        dim: int = 64,
        *,
        form: str = "beside",
        scale: float = 0.03,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not widths or dim < 1:
            raise ValueError(f"Expected blocks to adapt and a bottleneck width of at least 1 but got {widths}, {dim}")
        self.widths, self.dim, self.dropout = dict(widths), dim, Dropout(dropout)
        self.take_form({"form": form, "scale": scale})
        self.blocks = nn.ModuleDict({str(i): Bottleneck(width, dim, form) for i, width in sorted(widths.items())})

    @property
    def made_as(self) -> dict[str, Any]:
        """The values that decide, beside the weights, what is computed: "form" and "scale"."""
        return {"form": self.form, "scale": self.scale}

    def take_form(self, made_as: Mapping[str, Any]) -> None:
        """Take the form and the scale of the adapters that `made_as` describes.

        A description without "form" is of an earlier version, whose form was "after".

        Raises:
            ValueError: another form, or a scale that is no finite number.
        """
        form, scale = made_as.get("form", "after"), made_as.get("scale", 1.0)
        if form not in FORMS or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(
                f"Expected adapters of the form {' or '.join(FORMS)} with a finite scale but got {form!r}, {scale!r}"
            )
        self.form, self.scale = str(form), float(scale) if form == "beside" else 1.0

    def beside_mlp(self, number: int, x: Tensor) -> Tensor | None:
        """Return what is added beside a block's MLP; None in the form "after". See BlockEdit."""
        return self._made(number, x) if self.form == "beside" else None

    def after(self, number: int, h: Tensor) -> Tensor | None:
        """Return what is added behind a block; None in the form "beside". See BlockEdit."""
        return self._made(number, h) if self.form == "after" else None

    def _made(self, number: int, h: Tensor) -> Tensor:
        """Return what is added in a block: [B, N, D], or [B, D, H, W] (1x1 over channels) of a ResNet."""
        bottleneck, dropout = self.blocks[str(number)], self.dropout if self.training else None
        if h.ndim != 4:
            return bottleneck(h, self.form, self.scale, dropout)
        return bottleneck(h.movedim(1, -1), self.form, self.scale, dropout).movedim(-1, 1)

    def encode(self, clip: CLIP, images: Tensor, *, unit: bool = True) -> Tensor:
        """Return corrected features [B, E] of images [B, 3, S, S], fp32, L2-normalized if `unit`."""
        features = clip.visual.suffix(clip.visual.prefix(images, 0), 1, [self]).float()
        return F.normalize(features, dim=-1) if unit else features

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the weights, followed by form and scale unless the form is "after"."""
        weights = _digest({name: value.cpu() for name, value in self.state_dict().items()})
        return weights if self.form == "after" else f"{weights} {self.form} {self.scale!r}"


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()

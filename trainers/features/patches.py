"""Encode images by what the blocks of a frozen image encoder say of their patches, beside CLIP's own features.

CLIP's feature of an image is what its texts can name. The mean over the patches of what leaves a block knows more of
strokes and textures, and nothing of texts.

Legend: B images, E width of the joint embedding, T widths of the read blocks together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..clip import CLIP, BlockEdit
from ..clip.vision import VisionTower
from .encoder import ImageEncoder


def read_blocks(visual: VisionTower) -> tuple[int, ...]:
    """Return the numbers of the blocks whose patches are read: the one at two thirds of the depth, and the last."""
    return tuple(sorted({max(1, round(2 * visual.depth / 3)), visual.depth}))


class PatchReader(BlockEdit):
    """Read the mean patch of what leaves some blocks, and change nothing.

    Args:
        visual: the image encoder.
        numbers: of the blocks.
    """

    def __init__(self, visual: VisionTower, numbers: Sequence[int]) -> None:
        self.visual = visual
        self.numbers = tuple(numbers)
        self._read: dict[int, Tensor] = {}

    def after(self, number: int, h: Tensor) -> Tensor | None:
        """Keep the mean patch of h, which leaves the block, and add nothing."""
        if number in self.numbers:
            self._read[number] = self.visual.mean_patch(h).float()
        return None

    def patches(self) -> Tensor:
        """Return the mean patches of all blocks, side by side, [B, T], fp32; all of the blocks must have run."""
        return torch.cat([self._read[number] for number in self.numbers], dim=-1)


def features_and_patches(visual: VisionTower, hidden: Tensor, start: int, reader: PatchReader) -> Tensor:
    """Run blocks ``start``..depth, and return CLIP's normalized features beside the mean patches, [B, E + T], fp32.

    The last block is run twice: for the class token alone, so that features have the bits that they have elsewhere, and
    for every token.

    Args:
        visual: the frozen image encoder.
        hidden: what enters block ``start``.
        start: 1..depth.
        reader: has read the blocks before, and reads the others here.
    """
    hidden = visual.through(hidden, start, visual.depth - 1, [reader])
    features = F.normalize(visual.suffix(hidden, visual.depth).float(), dim=-1)
    visual.through(hidden, visual.depth, visual.depth, [reader])
    return torch.cat([features, reader.patches()], dim=-1)


class PatchEncoder(ImageEncoder):
    """Encode images by a frozen CLIP and, beside these features, by the mean patches of `read_blocks`.

    Args:
        clip, precision, autocast: see ImageEncoder.

    Raises:
        ValueError: the image encoder's blocks cannot be run.
    """

    def __init__(self, clip: CLIP, precision: str, autocast: Callable[[], Any]) -> None:
        super().__init__(clip, precision, autocast)
        self.blocks = read_blocks(clip.visual)
        clip.visual.check_edits([PatchReader(clip.visual, self.blocks)])

    @property
    def width(self) -> int:
        """E + T."""
        return self.clip.embed_dim + sum(self.clip.visual.widths[number] for number in self.blocks)

    @property
    def weights_digest(self) -> str:
        """The digest of CLIP's weights, and the numbers of the blocks."""
        return f"{self.clip.weights_digest}+patches:{','.join(map(str, self.blocks))}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return CLIP's features, normalized, and the mean patches, as they are, [B, E + T], of images [B, 3, H, W]."""
        visual = self.clip.visual
        reader = PatchReader(visual, self.blocks)
        with self.autocast():
            return features_and_patches(visual, visual.prefix(images.to(self.clip.device), 0), 1, reader)

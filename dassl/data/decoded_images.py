"""Keep decoded images in memory, for training sets that are small and gone through often."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dassl.utils import read_image

__all__ = ["DecodedImages"]


class DecodedImages:
    """A reader that keeps images' pixels, 3 bytes each, while there is room; other images are decoded each time.

    Which images are kept does not matter, as every epoch goes through all of them; so none is thrown out for another.

    Args:
        limit: bytes that all pixels may take, in each process that loads images.
        least: see ``read_image``.
    """

    def __init__(self, limit: int, least: int = 0) -> None:
        self._left, self._least = limit, least
        self._pixels: dict[str, np.ndarray] = {}

    def read(self, path: str) -> Image.Image:
        """Return the image as ``read_image`` gives it; the caller may change it."""
        known = self._pixels.get(path)
        if known is not None:
            return Image.fromarray(known)  # a copy
        image = read_image(path, self._least)
        if image.width * image.height * 3 <= self._left:
            self._pixels[path] = np.array(image)
            self._left -= self._pixels[path].nbytes
        return image

"""Take images in the forms that people have them in: paths, PIL images, arrays, tensors, or a mixture of these."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dassl.utils import InputError
from dassl.utils.images import as_rgb

from ..app.prediction import Source, find_images

FORMS = "paths, PIL images, arrays [H, W] or [H, W, 3], tensors [3, H, W]"


def list_images(X: Any) -> list[Source]:
    """Return each of the given images as a path or as a PIL image in RGB.

    Args:
        X: a list (or another sequence, a column of a table, an array [N, H, W, 3] or [N, H, W], a tensor [N, 3, H, W])
            of images; or the path of one image, or of a folder, of which all images below it are taken in the order of
            their names. Numbers are 0 to 255 where they are integers, and 0 to 1 where they are floats.

    Raises:
        InputError: something else is given; the message says what came, and at which place.
    """
    if isinstance(X, str | os.PathLike):
        path = os.fspath(X)
        if not os.path.isdir(path):
            return [path]
        files, empty = find_images([path])
        if not files:
            raise InputError(next(iter(empty.values())))
        return [file for file, _ in files]
    if isinstance(X, Image.Image):
        return [to_source(X, "X")]
    if isinstance(X, np.ndarray | torch.Tensor) and X.ndim == 3 and not _is_stack(X):
        raise InputError(
            f"Expected X to be a list of images but got one array of shape {tuple(X.shape)}: put it into a list, [X]"
        )
    if isinstance(X, bytes) or not isinstance(X, Iterable):
        raise InputError(f"Expected X to be a list of images ({FORMS}) but got {type(X).__name__}")
    return [to_source(image, f"X[{place}]") for place, image in enumerate(X)]


def _is_stack(values: Any) -> bool:
    """Return whether three dimensions mean gray images [N, H, W], not one image, whose channels are last or first."""
    return values.shape[0] not in (1, 3) if isinstance(values, torch.Tensor) else values.shape[-1] not in (1, 3, 4)


def to_source(image: Any, where: str = "the image") -> Source:
    """Return one image as a path or as a PIL image in RGB.

    Args:
        image: see FORMS.
        where: its place, for messages.

    Raises:
        InputError: the image has another form, or numbers that are no shades.
    """
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        if image.ndim == 3:
            image = image.permute(1, 2, 0)
        image = image.float().numpy() if image.dtype.is_floating_point else image.numpy()
    if isinstance(image, np.ndarray):
        image = _from_array(image, where)
    if not isinstance(image, Image.Image):
        raise InputError(f"Expected {where} to be an image ({FORMS}) but got {type(image).__name__}")
    try:
        return as_rgb(image)
    except (ValueError, OSError) as error:
        raise InputError(f"Expected {where} to be a readable image but got: {error}") from error


def _from_array(values: np.ndarray[Any, Any], where: str) -> Image.Image:
    shape = values.shape
    if values.ndim == 3 and shape[-1] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or 0 in shape or (values.ndim == 3 and shape[-1] not in (3, 4)):
        raise InputError(
            f"Expected {where} to be an array [H, W], [H, W, 3] or [H, W, 4], or a tensor [3, H, W], "
            f"but got shape {shape}"
        )
    if values.dtype == bool:
        values = values * np.uint8(255)
    elif values.dtype.kind == "f":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise InputError(f"Expected the floats of {where} to be 0 to 1 but got {_range(values)}")
        values = np.rint(255 * values)
    elif values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255:
        raise InputError(f"Expected the numbers of {where} to be 0 to 255 but got {values.dtype} {_range(values)}")
    return Image.fromarray(np.ascontiguousarray(values, dtype=np.uint8))


def _range(values: np.ndarray[Any, Any]) -> str:
    return f"{values.min()} to {values.max()}" if values.dtype.kind in "fiub" else ""


def as_files(sources: list[Source], folder: Path) -> list[str]:
    """Return paths of the images; those that are no files are written into a folder, without loss (PNG)."""
    paths = []
    for number, source in enumerate(sources):
        if isinstance(source, str):
            paths.append(source)
        else:
            path = folder / f"{number:06d}.png"
            source.save(path, compress_level=1)
            paths.append(str(path))
    return paths

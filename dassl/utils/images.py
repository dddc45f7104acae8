"""Read image files of every kind that people have as RGB, and name those that cannot be read with the reason."""

from __future__ import annotations

import contextlib
import os

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .errors import InputError

__all__ = ["MAX_ASPECT", "as_rgb", "read_image"]

# Longer : shorter side. Models see the middle of an image after its short side has been resized to theirs; beyond this
# ratio that middle shows next to nothing, and the resized strip can take gigabytes.
MAX_ASPECT = 100
# Pillow opens 16-bit files of these formats as 32-bit integers (PNG: in older versions of Pillow).
SIXTEEN_BIT_AS_INTEGERS = ("PNG", "PPM")
FLOAT_LIMIT = (
    1.5  # resampling and sharpening carry floats a little beyond white, which is cut off; more is no overshoot
)


def read_image(path: str | os.PathLike[str], least: int = 0) -> Image.Image:
    """Read the image at ``path`` as 8-bit RGB, turned the way its EXIF orientation says.

    Transparent pixels become white (what lies under them is arbitrary, black in most files), and of an animation the
    first picture is taken. White is 65535 in 16-bit files and 1 in files of floats, whatever the image's own maximum
    is: all images of a dataset have one scale. Files with 12 bits in 16 are therefore dark.

    Args:
        path: the file.
        least: a JPEG file is decoded at 1/2, 1/4 or 1/8 of its size, the smallest whose shorter side still has this
            many pixels; libjpeg-turbo leaves out the rest. Other formats are decoded whole. 0: all are.

    Raises:
        InputError: the file is missing, is not a readable image, is too large to be opened safely, is more than
            MAX_ASPECT times as long as wide, or has a number format in which white is unknown (32-bit integers, floats
            beyond 1). The message names the file and the reason.
    """
    try:
        with Image.open(path) as image:
            if least > 0:
                image.draft(None, (least, least))
            return as_rgb(image)
    except FileNotFoundError as error:
        raise InputError(f'Expected an image at "{os.fspath(path)}" but found no file') from error
    except UnidentifiedImageError as error:
        empty = os.path.getsize(path) == 0
        reason = "an empty file" if empty else "a file whose content is in no known image format"
        raise InputError(f'Expected "{os.fspath(path)}" to be a readable image but got {reason}') from error
    except Exception as error:  # a damaged file can make its format's decoder raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(
            f'Expected "{os.fspath(path)}" to be a readable image but got: {" ".join(reason.split())}'
        ) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image as 8-bit RGB, upright and on white; see ``read_image``.

    An image that is so already is not copied.

    Raises:
        ValueError: the image is more than MAX_ASPECT times as long as wide, or white is unknown in its number format.
    """
    _check_shape(image)  # before the pixels are decoded: sizes stand in the header
    image.load()
    return _opaque_rgb(_upright(image), image.format or "")


def _check_shape(image: Image.Image) -> None:
    longer, shorter = max(image.size), min(image.size)
    if longer > MAX_ASPECT * shorter:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_ASPECT} times as long as wide")


def _upright(image: Image.Image) -> Image.Image:
    # Phones store pictures sideways and note the orientation; models should see them upright. EXIF data too damaged to
    # tell the orientation are no reason to refuse a picture that is itself whole.
    with contextlib.suppress(Exception):
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else Pillow would copy the pixels for nothing
            return ImageOps.exif_transpose(image)
    return image


def _opaque_rgb(image: Image.Image, form: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_eight_bits(image, form)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_eight_bits(image: Image.Image, form: str) -> Image.Image:
    """Convert gray levels of 16 bits (0..65535) or of floats (0..1) to 0..255; Pillow itself would clip them."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode == "F":
        full = 1.0
        if values.max(initial=0.0) > FLOAT_LIMIT:
            raise ValueError(
                f"floats up to {values.max():.6g} where 1 is white: save it as 8 or 16 bits, or divided by its white"
            )
    elif image.mode.startswith("I;16") or form in SIXTEEN_BIT_AS_INTEGERS:
        full = 65535.0
    else:
        raise ValueError("32-bit integers, which tell no white: save it as 8 or 16 bits")
    return Image.fromarray(np.clip(np.rint(values * (255.0 / full)), 0, 255).astype(np.uint8))

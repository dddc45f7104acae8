"""Find how a backbone's weights want images: size, interpolation, mean and standard deviation."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any, NamedTuple

from ..log import DETAIL
from .backbones import Backbone, resolve_backbone
from .tiny import read_record, tiny_files

logger = logging.getLogger(__name__)


class Preprocessing(NamedTuple):
    """Describe how images were prepared in pretraining; the fields are named as in the node INPUT."""

    SIZE: tuple[int, int]  # height, width in pixels
    INTERPOLATION: str
    PIXEL_MEAN: tuple[float, ...]  # per RGB channel, of values in 0..1
    PIXEL_STD: tuple[float, ...]
    SQUASH: bool = False  # both sides are resized to SIZE; else the shorter one, and the middle is cut out


def preprocessing_of(name: str, weights: str = "") -> Preprocessing:
    """Return a backbone's own preprocessing.

    Args:
        name, weights: MODEL.BACKBONE.NAME and MODEL.BACKBONE.WEIGHTS; no tensors are read.

    Raises:
        ValueError: there is no such backbone, or the record of a tiny CLIP is damaged.
        FileNotFoundError: the record of a tiny CLIP is not there.
    """
    backbone = resolve_backbone(name)
    arch = read_record(tiny_files(weights or None)[0])["arch"] if name == "tiny" else backbone.arch
    return _of(backbone, arch["vision_cfg"]["image_size"])


def _of(backbone: Backbone, size: int | list[int]) -> Preprocessing:
    height, width = (size, size) if isinstance(size, int) else size
    # For a plain CLIP the middle is cut out whatever its authors did, as few-shot CLIP always has.
    squash = backbone.squash and not backbone.has_blocks
    return Preprocessing((height, width), backbone.interpolation, backbone.pixel_mean, backbone.pixel_std, squash)


def complete_input(cfg: Any, given: Collection[str]) -> None:
    """Fill the keys of the node INPUT that were not given with the backbone's own values, in place.

    If nothing says which transforms training takes, images are at least normalized. If the backbone
    is unknown, or the record of a tiny CLIP is damaged or missing, nothing is filled.

    Args:
        cfg: an unfrozen configuration.
        given: keys that were given for this backbone, such as "INPUT.SIZE"; they stay as they are.
    """
    try:
        own = preprocessing_of(cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.WEIGHTS)
    except (ValueError, FileNotFoundError):
        return  # the check of the backbone reports this error
    for key, value in own._asdict().items():
        if f"INPUT.{key}" not in given and key in cfg.INPUT:  # upstream's INPUT has no SQUASH
            cfg.INPUT[key] = type(cfg.INPUT[key])(value)
    if "INPUT.TRANSFORMS" not in given and not cfg.INPUT.TRANSFORMS:
        cfg.INPUT.TRANSFORMS = type(cfg.INPUT.TRANSFORMS)(("normalize",))


def tell_preprocessing(cfg: Any) -> None:
    """Log how images are prepared, and warn if that is not what the backbone's weights want."""
    node, name = cfg.INPUT, cfg.MODEL.BACKBONE.NAME
    own = preprocessing_of(name, cfg.MODEL.BACKBONE.WEIGHTS)
    other = [
        f"INPUT.{key} {_shown(node[key])} (its own: {_shown(value)})"
        for key, value in own._asdict().items()
        if key in node and _shown(node[key]) != _shown(value)
    ]
    if "normalize" not in node.TRANSFORMS:
        other.append('INPUT.TRANSFORMS without "normalize" (it wants normalized images)')
    logger.info(
        "Images for %s: %s pixels, %s%s, mean %s, standard deviation %s%s",
        name,
        " x ".join(map(str, node.SIZE)),
        node.INTERPOLATION,
        ", squashed" if node.get("SQUASH", False) else "",
        _shown(node.PIXEL_MEAN),
        _shown(node.PIXEL_STD),
        "" if other else " (its own)",
        extra=DETAIL,
    )
    if resolve_backbone(name).squash and not node.get("SQUASH", False):
        logger.info("The authors of %s squash test images to its size; here the middle is cut out, as for all", name)
    if other:
        logger.warning("Images are not prepared as the weights of %s want them: %s", name, "; ".join(other))


def _shown(value: Any) -> str:
    if isinstance(value, str | bool):
        return str(value)
    return "(" + ", ".join(f"{number:.8g}" for number in value) + ")"

"""Backbones: images to features. None is built in; a project registers its own."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from dassl.utils import Registry

logger = logging.getLogger(__name__)

BACKBONE_REGISTRY = Registry("BACKBONE")


class Backbone(nn.Module):
    """Base of a backbone: ``forward`` gives features [B, out_features]; a subclass sets ``_out_features``."""

    _out_features: int

    @property
    def out_features(self) -> int:
        """Width of the features."""
        return self._out_features


def build_backbone(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """The registered backbone ``name``, called with the keyword arguments; KeyError when there is none."""
    builder = BACKBONE_REGISTRY.get(name)
    if verbose:
        logger.info("Backbone: %s", name)
    return builder(**kwargs)

"""Build backbones by name; none is built in, a project registers its own."""

from __future__ import annotations

import logging
from typing import Any

from dassl.utils import Registry

logger = logging.getLogger(__name__)

BACKBONE_REGISTRY = Registry("BACKBONE")


def build_backbone(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """Build the registered backbone ``name`` with the keyword arguments; an unknown name is a KeyError."""
    builder = BACKBONE_REGISTRY.get(name)
    if verbose:
        logger.info("Backbone: %s", name)
    return builder(**kwargs)

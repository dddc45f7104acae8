"""Build heads by name."""

from __future__ import annotations

import logging
from typing import Any

from dassl.utils import Registry

logger = logging.getLogger(__name__)

HEAD_REGISTRY = Registry("HEAD")


def build_head(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """Build the registered head ``name`` with the keyword arguments; an unknown name is a KeyError."""
    builder = HEAD_REGISTRY.get(name)
    if verbose:
        logger.info("Head: %s", name)
    return builder(**kwargs)

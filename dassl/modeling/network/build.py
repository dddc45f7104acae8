"""Whole networks, by name. None is built in; a project registers its own."""

from __future__ import annotations

import logging
from typing import Any

from dassl.utils import Registry

logger = logging.getLogger(__name__)

NETWORK_REGISTRY = Registry("NETWORK")


def build_network(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """The registered network ``name``, called with the keyword arguments; KeyError when there is none."""
    builder = NETWORK_REGISTRY.get(name)
    if verbose:
        logger.info("Network: %s", name)
    return builder(**kwargs)

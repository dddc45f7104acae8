"""Build whole networks by name; none is built in, a project registers its own."""

from __future__ import annotations

import logging
from typing import Any

from dassl.utils import Registry

logger = logging.getLogger(__name__)

NETWORK_REGISTRY = Registry("NETWORK")


def build_network(name: str, verbose: bool = True, **kwargs: Any) -> Any:
    """Build the registered network ``name`` with the keyword arguments; an unknown name is a KeyError."""
    builder = NETWORK_REGISTRY.get(name)
    if verbose:
        logger.info("Network: %s", name)
    return builder(**kwargs)

"""Evaluators by name (``TEST.EVALUATOR``)."""

from __future__ import annotations

import logging
from typing import Any

from dassl.utils import Registry, check_availability
from dassl.utils.logger import DETAIL

logger = logging.getLogger(__name__)

EVALUATOR_REGISTRY = Registry("EVALUATOR")


def build_evaluator(cfg: Any, **kwargs: Any) -> Any:
    """Build the evaluator that ``cfg.TEST.EVALUATOR`` names, from cfg and the keyword arguments (``lab2cname``)."""
    name = cfg.TEST.EVALUATOR
    check_availability(name, EVALUATOR_REGISTRY.registered_names())
    if cfg.VERBOSE:
        logger.info("Loading evaluator: %s", name, extra=DETAIL)
    return EVALUATOR_REGISTRY.get(name)(cfg, **kwargs)

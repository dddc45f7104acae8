"""Trainers by name (``TRAINER.NAME``)."""

from __future__ import annotations

import logging
from typing import Any

from dassl.utils import Registry, check_availability

logger = logging.getLogger(__name__)

TRAINER_REGISTRY = Registry("TRAINER")


def build_trainer(cfg: Any) -> Any:
    """The trainer that ``cfg.TRAINER.NAME`` names, built from cfg.

    Raises:
        InputError: no trainer of that name; the message has the nearest one.
    """
    name = cfg.TRAINER.NAME
    check_availability(name, TRAINER_REGISTRY.registered_names())
    if cfg.VERBOSE:
        logger.info("Loading trainer: %s", name)
    return TRAINER_REGISTRY.get(name)(cfg)

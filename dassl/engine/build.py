"""Trainers by name (``TRAINER.NAME``)."""

from __future__ import annotations

import logging
from typing import Any

from dassl.utils import Registry, check_availability
from dassl.utils.logger import DETAIL

logger = logging.getLogger(__name__)

TRAINER_REGISTRY = Registry("TRAINER")


def build_trainer(cfg: Any, data: Any = None) -> Any:
    """Build the trainer that ``cfg.TRAINER.NAME`` names.

    Args:
        cfg: the frozen configuration.
        data: the trainer's data manager, or a stand-in for it; None: the trainer makes one from the configuration.

    Raises:
        InputError: no trainer of that name; the message has the nearest one.
    """
    name = cfg.TRAINER.NAME
    check_availability(name, TRAINER_REGISTRY.registered_names())
    if cfg.VERBOSE:
        logger.info("Loading trainer: %s", name, extra=DETAIL)
    trainer_class = TRAINER_REGISTRY.get(name)
    return trainer_class(cfg) if data is None else trainer_class(cfg, data)  # upstream's classes take a cfg only

"""Trainers by name (``TRAINER.NAME``)."""

from __future__ import annotations

import logging
from typing import Any

from dassl.utils import Registry, check_availability
from dassl.utils.logger import DETAIL

logger = logging.getLogger(__name__)

TRAINER_REGISTRY = Registry("TRAINER")


def build_trainer(cfg: Any, data: Any = None, hooks: Any = None) -> Any:
    """Build the trainer that ``cfg.TRAINER.NAME`` names.

    Args:
        cfg: the frozen configuration.
        data: the trainer's data manager, or a stand-in for it; None: the trainer makes one from the configuration.
        hooks: the hooks of the run; None: all those of a run on the command line, which write its files.

    Raises:
        InputError: no trainer of that name; the message has the nearest one.
    """
    name = cfg.TRAINER.NAME
    check_availability(name, TRAINER_REGISTRY.registered_names())
    if cfg.VERBOSE:
        logger.info("Loading trainer: %s", name, extra=DETAIL)
    trainer_class = TRAINER_REGISTRY.get(name)
    # Classes written for upstream take a cfg only.
    given = {name: value for name, value in (("data", data), ("hooks", hooks)) if value is not None}
    return trainer_class(cfg, **given)

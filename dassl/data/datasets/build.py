"""Build datasets by name."""

from __future__ import annotations

import logging

from dassl.config import CfgNode
from dassl.utils import Registry, check_availability
from dassl.utils.logger import DETAIL

from .base_dataset import DatasetBase

logger = logging.getLogger(__name__)

DATASET_REGISTRY = Registry("DATASET")


def build_dataset(cfg: CfgNode) -> DatasetBase:
    """Build the dataset that ``cfg.DATASET.NAME`` names, from ``cfg``; an unknown name is an InputError."""
    check_availability(cfg.DATASET.NAME, DATASET_REGISTRY.registered_names())
    if cfg.VERBOSE:
        logger.info("Loading dataset: %s", cfg.DATASET.NAME, extra=DETAIL)
    dataset: DatasetBase = DATASET_REGISTRY.get(cfg.DATASET.NAME)(cfg)
    return dataset

"""Datasets: one small module each, found and registered by being in this folder."""

from __future__ import annotations

import importlib
import pkgutil

from .config import extend_cfg

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from .unnamed import name_dataset  # noqa: E402  # after the readers, which register in the order of their names

__all__ = ["extend_cfg", "name_dataset"]

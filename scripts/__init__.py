"""Commands for runs, figures and datasets.

lib/ holds what they share, figures/ the commands that draw, dev/ those that only work on the project itself.

In the checkout they are run as files (`python scripts/compare.py`) and are the package `scripts`, beside `trainers`.
Installed they are `dlr_clip.scripts`, run as `dlr-clip compare`. They import each other and the methods as `scripts`
and `trainers`: these names are then made to mean the installed modules themselves.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _OtherNames(MetaPathFinder, Loader):
    """Import a module of ours by another name, without making a second module of it.

    Args:
        names: top-level name -> the package that it means.
    """

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names
        self._own: dict[str, Any] = {}  # other name -> the spec of the module

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname.partition(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        package, dot, rest = spec.name.partition(".")
        module = importlib.import_module(f"{self.names[package]}{dot}{rest}")
        self._own[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # It has been executed under its own name; importing it by the other has only replaced its spec.
        assert module.__spec__ is not None
        module.__spec__ = self._own.pop(module.__spec__.name)


if __name__ != "scripts":
    sys.meta_path.insert(0, _OtherNames({"scripts": __name__, "trainers": __name__.rpartition(".")[0]}))

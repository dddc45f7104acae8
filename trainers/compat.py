"""All that exists so that our trainers live beside other people's, and on an upstream Dassl.

Upstream is the toolbox wherever it is there; it refuses to register a name twice, and knows no `_BASE_` in YAML files.
What its trainers lack is in portable.py.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

logger = logging.getLogger(__name__)

BASE_KEY = "_BASE_"


def find_toolbox() -> None:
    """Have `import dassl` find the toolbox that comes with this package, where there is no other.

    Its folder goes last on the path, which other processes (those that read for a DataLoader) inherit.
    """
    if "dassl" in sys.modules:
        return
    spec = importlib.util.find_spec("dassl")
    if spec is None or spec.origin is None:  # None: a mere folder of that name
        here = Path(__file__).parent
        sys.path.append(str(here / "_toolbox" if (here / "_toolbox").is_dir() else here.parent))


def is_ours(trainer: Any) -> bool:
    """Return whether a trainer, or its class, is of our own toolbox: it handles precision and several heads itself."""
    return callable(getattr(trainer, "set_precision", None))


class _Printer(logging.Handler):
    """Prints what is logged, unless whoever runs the program has set logging up."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            print(self.format(record))


def be_heard(trainer_class: Any, package: str) -> None:
    """Have the lines of a package reach the console on an upstream Dassl, in place.

    Upstream prints, so that logging is not set up there; what is more, one of its datasets, imported with it, switches
    logging off for the whole process. Our toolbox sees to the console itself.

    Args:
        trainer_class: the toolbox's TrainerX.
        package: the name of our package.
    """
    log = logging.getLogger(package)
    if is_ours(trainer_class) or any(isinstance(handler, _Printer) for handler in log.handlers):
        return
    logging.disable(logging.NOTSET)
    log.setLevel(logging.INFO)
    log.addHandler(_Printer())


def first_come_first_served(registry: Any, package: str) -> None:
    """Have a registry admit a name that it knows, where one of the two is ours: the first stays, which is logged.

    Repositories of the CoOp family register CoOp, CoCoOp or ZeroshotCLIP themselves. Without this, whichever is
    imported second ends with a KeyError. Two classes of which neither is ours are still refused.

    Args:
        registry: Dassl's, ours or upstream's; changed in place, once.
        package: our package's name ("trainers" or "dlr_clip").
    """
    strict = registry.register
    if getattr(strict, "tolerant", False):
        return

    def from_here(target: Any) -> bool:
        return str(target.__module__).partition(".")[0] == package

    def register(obj: Any = None, force: bool = False) -> Any:
        def add(target: Any) -> Any:
            name = target.__name__
            first = registry.get(name) if name in registry.registered_names() else None
            if first is not None and not force and from_here(first) != from_here(target):
                logger.warning(
                    "%s of %s stays registered, that of %s is left out", name, first.__module__, target.__module__
                )
            else:
                strict(target, force=force)
            return target

        return add if obj is None else add(obj)

    register.tolerant = True  # type: ignore[attr-defined]
    registry.register = register


def merge_from_file(cfg: Any, path: str | os.PathLike[str]) -> None:
    """Merge one of our YAML files into a configuration of an upstream Dassl, in place.

    As `cfg.merge_from_file`, but what the file that `_BASE_` names (relative to it) says is merged before.

    Args:
        cfg: an unfrozen yacs node, after `extend_cfg`.
        path: a file of configs/trainers, say.

    Raises:
        ValueError: a `_BASE_` that leads back to a file, or a file that is no YAML.
        KeyError: a key that this toolbox does not know; a setting of ours that it cannot follow is never passed over.
    """
    if getattr(type(cfg), "follows_base", False):  # our own toolbox's
        cfg.merge_from_file(path)
        return
    for values in yaml_chain(Path(path).expanduser()):
        cfg.merge_from_other_cfg(_as_node(type(cfg), values))


def yaml_chain(path: Path) -> list[dict[str, Any]]:
    """Return what a YAML file says, after what the file that its `_BASE_` names says, and so on: the farthest first.

    Raises:
        ValueError: a `_BASE_` that leads back to a file, or a file that is no YAML.
    """
    chain: list[dict[str, Any]] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            raise ValueError(f"Expected {BASE_KEY} to lead to a file without one but got a cycle at {path}")
        seen.append(path.resolve())
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"Expected {path} to be YAML but got: {' '.join(str(error).split())}") from error
        base = values.pop(BASE_KEY, None)
        chain.insert(0, values)
        if base is None:
            return chain
        path = path.parent / base


def _as_node(make: Callable[[dict[str, Any]], Any], values: Mapping[str, Any]) -> Any:
    return make({key: _as_node(make, value) if isinstance(value, Mapping) else value for key, value in values.items()})

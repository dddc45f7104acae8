"""Let our trainers live beside other people's, and on an upstream Dassl.

Where upstream Dassl is installed, it is the toolbox. It refuses to register a name twice, and does not know `_BASE_` in
YAML files; this module makes up for both. What upstream's trainers lack is in portable.py.
"""

from __future__ import annotations

import functools
import importlib
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

    The toolbox's folder goes last on the path; other processes (those that read for a DataLoader) inherit the path.
    """
    if "dassl" in sys.modules:
        return
    spec = importlib.util.find_spec("dassl")
    if spec is None or spec.origin is None:  # an origin of None: a mere folder of that name
        here = Path(__file__).parent
        sys.path.append(str(here / "_toolbox" if (here / "_toolbox").is_dir() else here.parent))


def is_ours(trainer: Any) -> bool:
    """Return whether a trainer or its class is our own toolbox's, which handles precision and several heads itself."""
    return callable(getattr(trainer, "set_precision", None))


class _OneProcess:
    """Stand in for our toolbox's `distributed` where the toolbox has none: a job of one process."""

    @staticmethod
    def world_size() -> int:
        return 1

    @staticmethod
    def any_rank(here: bool) -> bool:
        return here


@functools.cache
def processes() -> Any:
    """Return our toolbox's module `distributed`; on an upstream Dassl, what stands for a job of one process."""
    try:
        return importlib.import_module("dassl.utils.distributed")
    except ImportError:  # an upstream Dassl
        return _OneProcess()


class _Printer(logging.Handler):
    """Print what is logged, unless the program has set up logging itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            print(self.format(record))


def be_heard(trainer_class: Any, package: str) -> None:
    """Have the lines of a package reach the console on an upstream Dassl, in place.

    Upstream prints and does not set up logging. What is more, one of its datasets, imported with it, switches logging
    off for the whole process. Our own toolbox sets up the console itself.

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
    """Have a registry keep the first of two classes of one name, where one of the two is ours, and log that.

    Repositories of the CoOp family register CoOp, CoCoOp or ZeroshotCLIP themselves. Without this, the import of the
    second package ends with a KeyError. Two classes of one name are still refused where both or neither are ours.

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

    This does what `cfg.merge_from_file` does, but first merges the file that `_BASE_` names (relative to this one).

    Args:
        cfg: an unfrozen yacs node, after `extend_cfg`.
        path: the YAML file, such as one of configs/trainers.

    Raises:
        ValueError: a `_BASE_` leads back to a file that was read before, or a file is no YAML.
        KeyError: this toolbox does not know a key; a setting of ours that it cannot follow is never ignored.
    """
    if getattr(type(cfg), "follows_base", False):  # our own toolbox's
        cfg.merge_from_file(path)
        return
    for values in yaml_chain(Path(path).expanduser()):
        cfg.merge_from_other_cfg(_as_node(type(cfg), values))


# It makes plain values only; libyaml's is ten times as fast, where PyYAML has been built with it.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def yaml_chain(path: Path) -> list[dict[str, Any]]:
    """Return the values of a YAML file and of the files along its chain of `_BASE_`; the file itself comes last.

    Raises:
        ValueError: a `_BASE_` leads back to a file that was read before, or a file is no YAML.
    """
    chain: list[dict[str, Any]] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            raise ValueError(f"Expected {BASE_KEY} to lead to a file without one but got a cycle at {path}")
        seen.append(path.resolve())
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"Expected {path} to be YAML but got: {' '.join(str(error).split())}") from error
        base = values.pop(BASE_KEY, None)
        chain.insert(0, values)
        if base is None:
            return chain
        path = path.parent / base


def _as_node(make: Callable[[dict[str, Any]], Any], values: Mapping[str, Any]) -> Any:
    return make({key: _as_node(make, value) if isinstance(value, Mapping) else value for key, value in values.items()})

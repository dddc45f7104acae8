"""The configurations that come with the project, by trainer and short name.

CoOp's `tiny` is configs/trainers/coop/tiny.yaml. Not the folder, but TRAINER.NAME in the file (or in the file that its
`_BASE_` names) says which trainer the file is for.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
from pathlib import Path
from typing import Any

from .compat import yaml_chain

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
# Once installed, the configurations are within this package; in the checkout, beside it.
CONFIGS = HERE / "_configs" if (HERE / "_configs").is_dir() else HERE.parent / "configs"
FOLDER = CONFIGS / "trainers"
PUBLISHED = HERE / "_published" if (HERE / "_published").is_dir() else HERE.parent / "published"
FIRST = "tiny"  # the configuration to suggest: it runs anywhere, without a download


def trainer_of(file: str | os.PathLike[str]) -> str:
    """Return the TRAINER.NAME that a YAML file sets, itself or by its `_BASE_`; "" where it sets none."""
    name = ""
    for values in yaml_chain(Path(file).expanduser()):
        node: Any = values.get("TRAINER")
        name = str((node.get("NAME") if isinstance(node, dict) else None) or name)
    return name


@functools.cache
def shipped_files() -> dict[Path, str]:
    """Return the project's own files, in order, with their trainers; they are read once in a process."""
    return {file: trainer_of(file) for file in sorted(FOLDER.glob("*/*.yaml"))}


def configs_of(trainer: str) -> dict[str, Path]:
    """Return the files that are made for a trainer, by short name (the file's stem), in order."""
    return {file.stem: file for file, name in shipped_files().items() if name == trainer}


def find_config(trainer: str, name: str) -> Path:
    """Return the file of a short name that is made for a trainer.

    Raises:
        ValueError: there is no such file; the message names those that there are.
    """
    found = configs_of(trainer)
    if name in found:
        return found[name]
    near = difflib.get_close_matches(name, found, 1)
    hint = f' (did you mean "{near[0]}"?)' if near else ""
    known = f"be one of {', '.join(found)}" if found else "be left out, as there is no configuration"
    path = "; --config-file takes a path" if os.path.basename(name) != name or name.endswith(".yaml") else ""
    raise ValueError(f'Expected --config to {known} for {trainer} but got "{name}"{hint}{path}')


def without_config(trainer: str) -> str:
    """Return the message for a command that names a trainer but neither a configuration nor a backbone."""
    found = configs_of(trainer)
    if not found:
        return "Expected a configuration (--config-file) or a backbone (--backbone) but got neither"
    name, here = FIRST if FIRST in found else next(iter(found)), Path.cwd()
    program = "dlr-clip train" if CONFIGS.parent == HERE else "python train.py"
    files = ", ".join(str(file.relative_to(here) if file.is_relative_to(here) else file) for file in found.values())
    return (
        "Expected a configuration (--config, or --config-file with one's own) or a backbone (--backbone) but got "
        f"neither. Try: {program} --trainer {trainer} --config {name} (of {trainer} there are {files})"
    )


def warn_if_for_another(file: str | os.PathLike[str], trainer: str) -> None:
    """Log a warning where a YAML file names another trainer than the one that it is used with."""
    named = trainer_of(file)
    if named not in ("", trainer):
        logger.warning("%s is a configuration of %s but is used with %s", file, named, trainer)

"""Find the project's packages, which have other places and names in the checkout than once installed.

checkout      installed
trainers      dlr_clip
datasets      dlr_clip.datasets       Hugging Face's package keeps the name `datasets`
scripts       dlr_clip.scripts
dassl         dassl, from dlr_clip/_toolbox, which holds nothing else
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

_ABOVE = Path(__file__).resolve().parents[1]
INSTALLED = (_ABOVE / "dlr_clip").is_dir()  # an editable install is the checkout
METHODS = _ABOVE / ("dlr_clip" if INSTALLED else "trainers")
SCRIPTS = METHODS / "scripts" if INSTALLED else _ABOVE / "scripts"
TOOLBOX = METHODS / "_toolbox" if INSTALLED else _ABOVE  # the folder that holds `dassl`
# What starts `train` in a process of its own: arguments of the interpreter, or of torchrun.
TRAIN = ("-m", "dlr_clip_cli", "train") if INSTALLED else (str(_ABOVE / "train.py"),)


def use_own_toolbox() -> None:
    """Have this process, and those that it starts, import our own `dassl`, also where upstream's is installed."""
    sys.path[:] = [str(TOOLBOX), *(entry for entry in sys.path if entry != str(TOOLBOX))]
    os.environ["PYTHONPATH"] = python_path()


def python_path() -> str:
    """Return the PYTHONPATH of a process that is to import our own packages, whatever the current folder is."""
    others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", str(TOOLBOX))]
    return os.pathsep.join([str(TOOLBOX), *others])


def import_ours(name: str) -> Any:
    """Import a module by the name that it has in the checkout, such as "trainers.app.train"."""
    package, dot, rest = name.partition(".")
    here = {"trainers": "dlr_clip", "scripts": "dlr_clip.scripts"}.get(package, package) if INSTALLED else package
    return importlib.import_module(f"{here}{dot}{rest}")


def spoken(command: str) -> str:
    """Return what a user types to start "train" or "predict": "python train.py", or "dlr-clip train"."""
    by_name = INSTALLED or sys.argv[0].startswith("dlr-clip ")
    return f"dlr-clip {command}" if by_name else f"python {command}.py"

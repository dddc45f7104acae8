"""The environment of a run: versions, commit, device and command."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import dassl

PACKAGES = (
    "dlr-clip",
    "torchvision",
    "open_clip_torch",
    "torchmetrics",
    "numpy",
    "scikit-learn",
    "pillow",
    "yacs",
    "tensorboard",
)


def describe(device: torch.device) -> dict[str, Any]:
    """Return versions, commit, device, command and time, as plain values for environment.json."""
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"torch": torch.__version__, **{name: _version(name) for name in PACKAGES}},
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dassl": dassl.__version__,
        **_own_commit(),
    }


def project_version() -> str:
    """Return the version of this project, and the commit where it is a checkout: "dlr-clip 0.1.0, commit 1a2b3c4"."""
    commit = _own_commit()
    changed = " with changes" if commit["modified"] else ""
    where = f", commit {commit['commit'][:7]}{changed}" if commit["commit"] else ""
    return f"dlr-clip {_version('dlr-clip') or '(not installed)'}{where}"


def why_no_gpu() -> str:
    """Return why torch has no GPU to compute on, where it has none."""
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return "this PyTorch is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {visible!r}"
    return "PyTorch finds no GPU, or no driver for it"


@functools.cache  # a process has the versions that it began with
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@functools.cache  # git takes its time, and what is imported does not change with the checkout
def _own_commit() -> dict[str, Any]:
    return _commit(Path(dassl.__file__).parent)


def _commit(folder: Path) -> dict[str, Any]:
    """Return the commit of the checkout, and whether tracked files differ from it.

    Both are None where git or a checkout is missing. A repository that does not track this package is no checkout: it
    may merely hold the environment in which the package is installed.
    """
    tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py") is not None
    head = _git(folder, "rev-parse", "HEAD") if tracked else None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no") if head else None
    return {"commit": head, "modified": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

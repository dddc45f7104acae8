"""Small helpers: files, JSON, seeds, name checks."""

from __future__ import annotations

import difflib
import json
import logging
import os
import random
import shutil
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from dassl.upstream_names import upstream_name

from .errors import InputError
from .files import atomic_write, file_digest
from .images import read_image
from .packages import needed_package

logger = logging.getLogger(__name__)

__all__ = [
    "check_availability",
    "check_isfile",
    "collect_env_info",
    "did_you_mean",
    "download_url",
    "get_most_similar_str_to_a_from_b",
    "listdir_nohidden",
    "mkdir_if_missing",
    "read_image",
    "read_json",
    "set_random_seed",
    "tolist_if_not",
    "write_json",
]


def mkdir_if_missing(dirname: str | os.PathLike[str]) -> None:
    """Create a folder and its parents unless it exists."""
    os.makedirs(dirname, exist_ok=True)


def check_isfile(fpath: str | os.PathLike[str]) -> bool:
    """Return whether ``fpath`` is a file; warn if it is missing."""
    found = os.path.isfile(fpath)
    if not found:
        warnings.warn(f'No file found at "{fpath}"', stacklevel=2)
    return found


def listdir_nohidden(path: str | os.PathLike[str], sort: bool = False) -> list[str]:
    """List the names of the files and folders in ``path`` that do not start with a dot."""
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    return sorted(names) if sort else names


def read_json(fpath: str | os.PathLike[str]) -> Any:
    """Read the content of a JSON file; a file that is missing or not JSON is an InputError."""
    try:
        with open(fpath, encoding="utf-8") as stream:
            return json.load(stream)
    except FileNotFoundError as error:
        raise InputError(f'Expected a JSON file at "{fpath}" but found none') from error
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, nested without end
        raise InputError(f'Expected "{fpath}" to hold JSON but got: {error}') from error


def write_json(obj: Any, fpath: str | os.PathLike[str]) -> None:
    """Write ``obj`` as JSON (indent 4, items separated by "," and keys by ": "), making the folder when missing."""
    with atomic_write(fpath) as stream:
        json.dump(obj, stream, indent=4, separators=(",", ": "))


def set_random_seed(seed: int) -> None:
    """Seed Python's ``random``, NumPy and torch (CPU and all CUDA devices); 0 is a seed like any other."""
    if not 0 <= seed < 2**32:
        raise InputError(f"Expected the seed to be in [0, 2**32) but got {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def collect_env_info() -> str:
    """Return the versions of PyTorch, CUDA, the system and Pillow as text, for the head of a log."""
    from torch.utils.collect_env import get_pretty_env_info  # imports much, and is needed once per run

    return f"{get_pretty_env_info()}\n        Pillow ({PIL.__version__})"


def get_most_similar_str_to_a_from_b(a: str, b: Iterable[str]) -> str | None:
    """Return the string in ``b`` most similar to ``a`` (ratio of matching characters); None when ``b`` is empty."""
    return max(b, key=lambda name: difflib.SequenceMatcher(None, a.lower(), name.lower()).ratio(), default=None)


def did_you_mean(name: str, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """Return ``' (did you mean "..."?)'`` when some known name is similar enough to be meant, else an empty string.

    Args:
        name: the name that was given.
        known: the names that exist.
        aliases: other name -> known name; other names are compared too, and the known name is suggested.
    """
    meant = {_letters(alias): target for alias, target in (aliases or {}).items()}
    meant |= {_letters(target): target for target in known}
    closest = get_most_similar_str_to_a_from_b(_letters(name), meant)
    if closest is None or difflib.SequenceMatcher(None, _letters(name), closest).ratio() < 0.5:
        return ""
    return f' (did you mean "{meant[closest]}"?)'


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower())) or name


def check_availability(requested: str, available: Sequence[str]) -> None:
    """Raise an InputError (a ValueError) with the nearest match unless ``requested`` is among ``available``."""
    if requested not in available:
        raise InputError(
            f'Expected one of {", ".join(available) or "(nothing registered)"} but got "{requested}"'
            f"{did_you_mean(requested, available)}"
        )


def tolist_if_not(x: Any) -> list[Any]:
    """Return ``x`` if it is a list, a list of its items if it is a tuple, else a list holding ``x``."""
    if isinstance(x, tuple):
        return list(x)
    return x if isinstance(x, list) else [x]


def download_url(
    url: str, dst: str | os.PathLike[str], from_gdrive: bool = False, sha256: str | None = None, timeout: float = 60.0
) -> None:
    """Download a file to ``dst``; an incomplete file never has that name.

    Args:
        url: http(s) address, or a Google Drive link with ``from_gdrive``.
        dst: the file to write.
        from_gdrive: fetch with the optional package ``gdown``, which knows Google Drive's confirmation pages.
        sha256: expected hex digest; the file is refused when it differs.
        timeout: seconds to wait for the server at each read.
    """
    target = Path(dst)
    logger.info("Downloading %s to %s", url, target)
    if from_gdrive:
        _download_from_gdrive(url, target, sha256)
        return
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response, atomic_write(target, "wb") as stream:
            shutil.copyfileobj(response, stream, length=1 << 20)
            stream.flush()
            _check_sha256(Path(stream.name), sha256, url)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise InputError(
            f'Expected to download "{url}" but got: {error}. Put the file at "{target}" by hand'
        ) from error


def _download_from_gdrive(url: str, target: Path, sha256: str | None) -> None:
    gdown = needed_package("gdown", f'downloading "{url}"', advice=f', or put the file at "{target}" by hand')
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    if gdown.download(url, str(part), quiet=False) is None:
        raise InputError(f'Expected to download "{url}" but failed. Put the file at "{target}" by hand')
    _check_sha256(part, sha256, url)
    os.replace(part, target)


def _check_sha256(path: Path, expected: str | None, url: str) -> None:
    if expected is None:
        return
    digest = file_digest(path)
    if digest != expected.lower():
        raise InputError(f'Expected "{url}" to have the SHA-256 {expected} but got {digest}')


def __getattr__(name: str) -> Any:  # names that upstream's module offers, too
    return upstream_name(__name__, name)

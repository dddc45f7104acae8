"""Find the folder for files that the project makes: generated images, and splits of datasets in read-only folders."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dassl.utils import InputError

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """Return the cache folder: `$DLR_CLIP_CACHE`, else `$XDG_CACHE_HOME/dlr_clip`, else `~/.cache/dlr_clip`.

    The folder need not exist yet. A relative path counts from the working directory.
    """
    if own := os.environ.get("DLR_CLIP_CACHE"):
        return Path(own).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().absolute() / "dlr_clip"
    return Path.home() / ".cache" / "dlr_clip"


def made_dataset_dir(root: str, name: str) -> Path:
    """Return the folder of a dataset that makes its own images: in the user's cache, never in DATASET.ROOT.

    A user who forgets to name a dataset gives the folder of their own photos as `root`. Images made there would be one
    of the user's classes from then on.
    """
    if root:
        logger.warning(f"The images of {name} are made by this project: they lie in {cache_root()}, not in {root}")
    return cache_root() / name


def build_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Make `folder` by `fill(temporary sibling folder)` and one rename, unless it is there already.

    A folder that exists is therefore complete, however the process that made it ended. If two processes start together,
    one of them makes the folder and the other uses it.

    Raises:
        InputError: the folder cannot be written; the message names it and the two ways to choose another place.
    """
    if folder.is_dir():
        return folder
    temporary: str | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
        os.chmod(temporary, 0o755)  # mkdtemp gives 0700, which would lock other users out of a shared --root
        logger.info(f"Making {folder} (once)")
        fill(Path(temporary))
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # anything but "another process was faster"
                raise
    except OSError as error:
        raise InputError(
            f"Expected to be able to write {folder} but got: {error.strerror or error}. "
            "Choose another place with --root or the environment variable DLR_CLIP_CACHE"
        ) from error
    finally:
        if temporary is not None and os.path.isdir(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
    return folder

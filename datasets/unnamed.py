"""Decide which dataset is meant by a command that names none."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from dassl.data.datasets import DATASET_REGISTRY
from dassl.utils import InputError

from .files import holds_images, list_folders
from .image_folder import CSV_NAME, ImageFolder
from .layout import scan_folder

logger = logging.getLogger(__name__)

DEFAULT_DATASET = "Digits"


def name_dataset(root: str) -> str:
    """Return the registered name of the dataset that a command without one means.

    Args:
        root: DATASET.ROOT. "" means Digits, which needs no root. A folder of the user's own images, or a CSV file,
            means ImageFolder.

    Raises:
        InputError: `root` is something else; the message says what to give.
    """
    if not root:
        return DEFAULT_DATASET
    path = Path(os.path.abspath(os.path.expanduser(root)))
    what = "Expected --dataset-config-file (or DATASET.NAME) to say which dataset is meant but none was given"
    if path.is_dir() and not (path / CSV_NAME).is_file():
        known = {str(getattr(cls, "folder", "")): name for name, cls in DATASET_REGISTRY.items()}
        found = [folder for folder in list_folders(path) if folder in known and folder not in ("", "digits", "shapes")]
        if found:
            names = ", ".join(f"{folder} ({known[folder]})" for folder in found[:5])
            raise InputError(f"{what}, and {root} holds the datasets {names}")
        if not any(holds_images(f"{path}/{folder}") for folder in list_folders(path)):
            try:
                scan_folder(path)
            except InputError as error:
                raise InputError(f"{what}, and {root} is no folder of your own images either: {error}") from error
    elif not path.is_dir() and path.suffix.lower() != ".csv":
        state = "no folder and no CSV file" if path.exists() else "not there"
        raise InputError(f"{what}, and {root} is {state}")
    logger.info(f"No dataset is named: the images in {root} are taken as your own ({ImageFolder.__name__})")
    return ImageFolder.__name__

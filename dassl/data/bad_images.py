"""Find the images that cannot be read, and go on without them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from dassl.utils import InputError, one_line, read_image

from .datasets import DatasetBase

logger = logging.getLogger(__name__)

__all__ = ["find_bad_images", "skip_bad_images"]


def find_bad_images(paths: Iterable[str]) -> dict[str, str]:
    """Open and decode each image once, and return path -> reason for those that cannot be read."""

    def reason(path: str) -> str:
        try:
            read_image(path)
        except InputError as error:
            return str(error)
        return ""

    unique = list(dict.fromkeys(paths))
    # Threads suffice: decoders release the interpreter's lock.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        reasons = pool.map(reason, unique)
        return {path: reason for path, reason in zip(unique, reasons, strict=True) if reason}


def skip_bad_images(dataset: DatasetBase) -> dict[str, str]:
    """Take the images that cannot be read out of the dataset's lists, and say so.

    This is done before training, not while it runs: the batches of an epoch then do not depend on what fails when.

    Returns:
        Path -> reason, for each image taken out.

    Raises:
        InputError: a class would be left without training images, or nothing to test on.
    """
    lists = (dataset.train_x, dataset.train_u, dataset.val, dataset.test)
    bad = find_bad_images(item.impath for items in lists for item in items or ())
    if bad:
        dataset.drop(bad)
        logger.warning("Skipped %d images that cannot be read:", len(bad))
        for reason in bad.values():
            logger.warning("  %s", one_line(reason))
    return bad

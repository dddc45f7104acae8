"""Inspect the photos of a run or of a saved classifier: load the model, and find out which photos are which."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dassl.config import CfgNode
from dassl.data.datasets import build_dataset
from dassl.utils import InputError, did_you_mean

from ..app.data import image_folder, layout
from ..app.prediction import load_model, model_arguments
from .inspection import TEST, TRAINING, Findings, Photo, inspect_photos
from .runs import apart, wrong_input_told


def inspect_model(model: str | os.PathLike[str], images: str = "", device: str = "auto") -> tuple[Findings, str]:
    """Return what is wrong with the photos of a run, or with those of a folder, and a title.

    Args:
        model: output folder of a run, or a file that FewShotClassifier.save has written.
        images: a folder of images, or a CSV file; "": the run's own.
        device: "auto", "cpu" or "cuda".

    Raises:
        InputError: the model or the images are not there, or have other classes.
    """
    args = model_arguments(model, device == "cpu")
    with apart(1), wrong_input_told():
        ready = load_model(args)
        cfg, names = ready.trainer.cfg.clone(), list(ready.trainer.dm.dataset.classnames)
        if not images and os.path.isfile(args.model_dir):
            raise InputError(f"Expected --images for {args.model_dir}: a saved classifier has no images")
        photos = photos_below(images, names) if images else _of_run(cfg, names)
        found = inspect_photos(ready.trainer, photos, temperature=ready.temperature)
    return found, f"Photos of {images or cfg.DATASET.ROOT or cfg.DATASET.NAME}"


def _of_run(cfg: CfgNode, trained: Sequence[str]) -> list[Photo]:
    """Return the photos of the dataset that a run was trained and tested on."""
    cfg.defrost()
    cfg.DATALOADER.SKIP_BAD_IMAGES = True  # files that are missing or broken are named on the page
    cfg.freeze()
    dataset = build_dataset(cfg)
    labels = {label: _position(name, trained) for label, name in dataset.lab2cname.items()}
    parts = (TRAINING, [*dataset.train_x, *(dataset.val or ())]), (TEST, dataset.test or ())
    return [Photo(item.impath, labels[item.label], part) for part, items in parts for item in items]


def photos_below(images: str | os.PathLike[str], trained: Sequence[str]) -> list[Photo]:
    """Return the photos of a folder with a folder for each class, or of a CSV file; no split is drawn.

    Photos that are said to be for training or validation count as TRAINING, all others as TEST.

    Args:
        trained: the classes of the classifier, by the names that CLIP reads.

    Raises:
        InputError: the folder cannot be understood, or has a class that the classifier does not know.
    """
    path = Path(os.fspath(images)).expanduser().absolute()
    table = path if path.suffix.lower() == ".csv" else path / image_folder.CSV_NAME
    folder = path.parent if table == path else path
    if not path.exists():
        raise InputError(f"Expected a folder of images, or a CSV file, but {path} is not there")
    photos = image_folder.read_csv(table) if table.is_file() else layout.scan_folder(folder)
    names = image_folder.class_names(folder, sorted({photo.key for photo in photos}))
    labels = {key: _position(name, trained) for key, name in names.items()}
    return [
        Photo(str(folder / photo.path), labels[photo.key], TRAINING if photo.part in ("train", "val") else TEST)
        for photo in photos
    ]


def _position(name: str, trained: Sequence[str]) -> int:
    if name not in trained:
        raise InputError(
            f"Expected images of the classes trained on ({', '.join(trained[:10])}) but got {name!r}"
            f"{did_you_mean(name, trained)}"
        )
    return list(trained).index(name)

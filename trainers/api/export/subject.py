"""Load what is exported, a run or a saved classifier, in fp32 on the CPU, and images to try the result on.

Legend: N images, C classes, H and W height and width of the model's input.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dassl.data.datasets import build_dataset
from dassl.engine import TRAINER_REGISTRY
from dassl.utils import InputError, check_availability
from dassl.utils.cli import SETUP_ERRORS, given_wrongly
from dassl.utils.logger import muted

from ...app.prediction import Model, find_images, load_cfg, load_trainer, model_arguments, predict, read_batches
from ..images import as_files
from ..model_file import load_trainer_of, read_file
from ..runs import wrong_input_told

MOST_IMAGES = 256  # more would say little more, and take long on large models
MADE_UP = 8


@dataclass(frozen=True)
class Subject:
    """A trained method that is to be exported.

    Attributes:
        model: it, ready to classify, in fp32 on the CPU.
        method: name of its trainer.
        class_names: as CLIP reads them; `model.names` are the answers.
    """

    model: Model
    method: str
    class_names: list[str]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Size, interpolation, squash, mean and standard deviation that make an input of an image."""
        node = self.model.trainer.cfg.INPUT
        normalized = "normalize" in node.TRANSFORMS
        return {
            "size": list(node.SIZE),
            "interpolation": node.INTERPOLATION,
            "squash": node.SQUASH,
            "mean": list(node.PIXEL_MEAN) if normalized else [0.0, 0.0, 0.0],
            "std": list(node.PIXEL_STD) if normalized else [1.0, 1.0, 1.0],
        }


def method_of(source: str) -> tuple[str, type]:
    """Return the name and the class of the method of a run's folder, or of a saved classifier; CLIP is not loaded.

    Raises:
        InputError: it is neither, or the method is not registered.
    """
    if Path(source).is_file():
        name = str(read_file(source)[0].get("method", ""))
    else:
        if not Path(source, "config.yaml").is_file():
            raise InputError(
                f"Expected the folder of a finished run, or a file that FewShotClassifier.save has written, but there "
                f"is no {Path(source, 'config.yaml')}"
            )
        with wrong_input_told():
            name = load_cfg(model_arguments(source)).TRAINER.NAME
    with wrong_input_told():
        check_availability(name, TRAINER_REGISTRY.registered_names())
    return name, TRAINER_REGISTRY.get(name)


def load_subject(source: str, weights: str | None = None) -> Subject:
    """Load a run's folder, or a saved classifier, in fp32 on the CPU.

    Args:
        source: the folder or file.
        weights: a local file of the backbone's weights; None: those that the run names, or those of the cache.

    Raises:
        InputError: it cannot be loaded.
    """
    method, cls = method_of(source)
    node: str = cls.config_node()  # type: ignore[attr-defined]  # every registered trainer has it
    if Path(source).is_file():
        trainer, record = load_trainer_of(source, weights, "cpu", precision="fp32")
        model = Model(trainer, list(map(str, record["classes"])), record["temperature"], record["threshold"])
        return Subject(model, method, list(record["class_names"]))
    settings = [["MODEL.BACKBONE.WEIGHTS", weights]] if weights else []
    with wrong_input_told():
        if "PREC" in load_cfg(model_arguments(source)).TRAINER[node]:
            settings.append([f"TRAINER.{node}.PREC", "fp32"])
        trainer, names = load_trainer(model_arguments(source, cpu=True, settings=settings))
    return Subject(Model(trainer, names), method, names)


@dataclass(frozen=True)
class Examples:
    """Images that an exported file is tried on, with what predict.py says of them.

    Attributes:
        inputs: [N, 3, H, W], normalized, fp32.
        expected: [N, C], the probabilities that predict.py gives, fp32.
        labels: [N]; None: they are not known.
        told: what they are, for people.
    """

    inputs: Tensor
    expected: Tensor
    labels: Tensor | None
    told: str

    def pixels(self, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Return the pixels [N, H, W, 3], uint8, that were normalized with a mean and a standard deviation."""
        shade = self.inputs * torch.tensor(list(std)).view(1, 3, 1, 1) + torch.tensor(list(mean)).view(1, 3, 1, 1)
        return (shade * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


Listed = tuple[list[str], list[int] | None, str]  # files, labels, what they are


def list_examples(subject: Subject, given: Sequence[str], folder: Path) -> Listed:
    """Return files of images to try an export on: those given, else the run's validation images, else made-up ones.

    Args:
        subject: what is exported.
        given: files and folders; an image in a folder called like a class is one of that class.
        folder: for images that are made up.

    Raises:
        InputError: there are no images in what is given.
    """
    if given:
        found, empty = find_images(given)
        if empty or not found:
            raise InputError(next(iter(empty.values()), "Expected images but got none"))
        files = [path for path, _ in found]
        places = {name: place for place, name in enumerate(subject.model.names)}
        labels = [places.get(Path(path).absolute().parent.name, -1) for path in files]
        return thinned(files, labels if min(labels) >= 0 else None, "images given")
    items = validation_items(subject.model.trainer.cfg)
    if items:
        return thinned([item.impath for item in items], [item.label for item in items], "validation images of the run")
    return as_files(list(made_up_images()), folder), None, "made-up images"


def thinned(files: list[str], labels: list[int] | None, told: str) -> Listed:
    """Return at most 256 of the images, drawn with a fixed seed."""
    rows = range(len(files))
    if len(files) > MOST_IMAGES:
        rows = sorted(random.Random(0).sample(rows, MOST_IMAGES))  # type: ignore[assignment]  # a list like a range
        told = f"of the {len(files)} {told}"
    return [files[row] for row in rows], None if labels is None else [labels[row] for row in rows], told


def validation_items(cfg: Any) -> list[Any]:
    """Return the items of a run's validation images whose files are there; none where its dataset is not."""
    if not cfg.DATASET.NAME or (cfg.DATASET.NAME == "ImageFolder" and not cfg.DATASET.ROOT):
        return []
    try:
        with muted(logging.ERROR):
            dataset = build_dataset(cfg)
    except SETUP_ERRORS as error:
        if not given_wrongly(error):
            raise
        return []
    return [item for item in dataset.val or () if Path(item.impath).is_file()]


def made_up_images() -> Iterator[Image.Image]:
    """Yield images of random patches, each of another size and roughness."""
    rng = np.random.default_rng(0)
    for number in range(MADE_UP):
        coarse = rng.integers(0, 256, (2 + number, 3 + number, 3), dtype=np.uint8)
        yield Image.fromarray(coarse).resize((300 + 10 * number, 260), Image.Resampling.NEAREST)


def read_examples(subject: Subject, listed: Listed) -> Examples:
    """Read images, and have predict.py's functions say what they show.

    Raises:
        InputError: none of them can be read.
    """
    files, labels, told = listed
    trainer = subject.model.trainer
    answers, _, _ = predict(subject.model, [(path, path) for path in files])
    by_path = {answer.path: answer.probabilities for answer in answers}
    rows = [number for number, path in enumerate(files) if path in by_path]
    if not rows:
        raise InputError(f"Expected images that can be read but could read none of {len(files)}")
    inputs = [
        image for good, _ in read_batches(trainer, [files[row] for row in rows], bar=False) for _, image in good
    ]  # fmt: skip
    return Examples(
        torch.stack(inputs),
        torch.stack([by_path[files[row]] for row in rows]),
        None if labels is None else torch.tensor([labels[row] for row in rows]),
        f"{len(rows)} {told}",
    )

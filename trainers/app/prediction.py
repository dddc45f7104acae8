"""A finished run's trainer without its images, and what it says about new ones."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dassl.config import CfgNode
from dassl.data.data_manager import usable_workers
from dassl.data.transforms import build_transform, least_side
from dassl.engine import TRAINER_REGISTRY, build_trainer
from dassl.evaluation.passes import as_heads, progress_bar
from dassl.utils import InputError, check_availability, did_you_mean, one_line, read_image
from dassl.utils.checkpoints import BEST_NAME, pointed_file

from .configuration import default_cfg
from .data import files as image_files

FEW_IMAGES = 64  # fewer are read faster than reader processes start

Source = str | Image.Image  # a path, or an image in RGB
Rows = list[tuple[int, Tensor]]  # number of an image, and its tensor [3, H, W]


class Prediction(NamedTuple):
    """Hold the answer for one image."""

    path: str
    name: str  # relative to the folder given, or the file's name
    probabilities: Tensor  # [C]
    unknown: bool | None = None  # whether no class is probable enough; None: nobody asked


class Model(NamedTuple):
    """Hold a trainer that is ready to classify, and how its logits are to be read.

    Attributes:
        trainer: the trainer.
        names: its classes.
        temperature: what logits are divided by.
        threshold: below it, no class is probable enough; None: the best class is always the answer.
    """

    trainer: Any
    names: list[str]
    temperature: float = 1.0
    threshold: float | None = None


def load_cfg(args: argparse.Namespace) -> CfgNode:
    """Return the configuration of the run, for prediction."""
    path = Path(args.model_dir) / "config.yaml"
    if not path.is_file():
        raise InputError(f"Expected --model-dir to be the output folder of a run but there is no {path}")
    cfg = default_cfg()
    cfg.merge_from_file(path)
    cfg.merge_from_list([word for pair in args.set for word in pair])
    if args.batch_size is not None:
        cfg.DATALOADER.TEST.BATCH_SIZE = args.batch_size
    cfg.USE_CUDA = cfg.USE_CUDA and not args.cpu
    cfg.VERBOSE = args.debug
    cfg.TEST.SPLIT, cfg.TEST.FINAL_MODEL = "test", "last_step"  # no validation images are needed here
    cfg.freeze()
    return cfg


def class_list(args: argparse.Namespace) -> tuple[list[str] | None, list[int] | None]:
    """Return (class names to predict, their positions among those trained on).

    The names are None where the run's folder does not say. The positions are None unless --classes names a part of the
    classes trained on.
    """
    path = Path(args.model_dir) / "classes.json"
    trained: list[str] | None = None
    if path.is_file():
        try:
            trained = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"Expected {path} to be a list of class names but got: {error}") from error
        if not isinstance(trained, list) or not trained or not all(isinstance(name, str) for name in trained):
            raise InputError(f"Expected {path} to be a list of class names but got something else")
    if args.classes is None:
        return trained, None
    names = [name.strip() for name in next(csv.reader([args.classes], skipinitialspace=True), [])]
    if not names or not all(names) or len(set(names)) < len(names):
        raise InputError(f'Expected --classes to be different names, as "a,b,c", but got "{args.classes}"')
    known = trained is not None and set(names) <= set(trained)
    return names, [trained.index(name) for name in names] if known and trained else None


class ClassesOnly:
    """A trainer's data manager that knows the classes and has no images.

    Args:
        names: the classes.
        indices: which of the classes trained on they are; None: all of them, or others.
    """

    def __init__(self, names: Sequence[str], indices: list[int] | None) -> None:
        self.lab2cname = dict(enumerate(names))
        self.num_classes = len(names)
        self.num_source_domains = 0
        self.dataset = SimpleNamespace(
            classnames=list(names), lab2cname=self.lab2cname, num_classes=len(names), class_indices=indices,
            train_x=[], train_u=None, val=None, test=[], test_only=False, split_digest="", data_digest="",
        )  # fmt: skip
        self.train_loader_x = self.test_loader = (None,)  # their length counts: schedules are made of it
        self.train_loader_u = self.val_loader = None
        self.bad_images: dict[str, str] = {}


def model_arguments(
    model: str | os.PathLike[str], cpu: bool = False, settings: Sequence[Sequence[str]] = ()
) -> argparse.Namespace:
    """Return what `load_model` takes for a run's folder or a saved classifier, used as it is but for some settings.

    A saved classifier has its own threshold, where it has one.
    """
    return argparse.Namespace(
        model_dir=os.fspath(model), classes=None, set=list(settings), batch_size=None, cpu=cpu, debug=False,
        load_epoch=None, unknown=None,
    )  # fmt: skip


def load_model(args: argparse.Namespace) -> Model:
    """Return the model of a run's folder, or of a file that FewShotClassifier.save has written.

    Raises:
        InputError: it is neither, or a flag does not suit it.
    """
    if not Path(args.model_dir).is_file():
        if args.unknown == "auto":
            raise InputError("Expected --unknown to come with a probability for a run, which has chosen none")
        return Model(*load_trainer(args), threshold=args.unknown)
    from ..api.model_file import load_trainer_of  # it needs more than predictions of runs do

    for flag in ("classes", "load_epoch", "set"):
        if getattr(args, flag):
            raise InputError(f"Expected no --{flag.replace('_', '-')} for a saved classifier, which is used as it is")
    trainer, record = load_trainer_of(args.model_dir, None, "cpu" if args.cpu else "auto", args.batch_size)
    threshold = record["threshold"] if args.unknown == "auto" else args.unknown
    if args.unknown == "auto" and threshold is None:
        raise InputError(
            f"Expected --unknown to come with a probability for {args.model_dir}, which has none: it was fitted "
            'without unknown="auto"'
        )
    return Model(trainer, list(map(str, record["classes"])), record["temperature"], threshold)


def load_trainer(args: argparse.Namespace) -> tuple[Any, list[str]]:
    """Return the run's trainer with its checkpoint loaded, and the class names that it predicts.

    A trainer class that cannot be built without its training images says so with `needs_training_images = True`; then,
    and for runs that kept no class names, the run's dataset has to be where it was.
    """
    cfg = load_cfg(args)
    names, indices = class_list(args)
    check_availability(cfg.TRAINER.NAME, TRAINER_REGISTRY.registered_names())
    trainer_class = TRAINER_REGISTRY.get(cfg.TRAINER.NAME)
    if names is None or trainer_class.needs_training_images:
        if args.classes is not None:
            raise InputError(f"Expected no --classes for {cfg.TRAINER.NAME}, which predicts the classes of its images")
        trainer = build_trainer(cfg)
    else:
        trainer = build_trainer(cfg, ClassesOnly(names, indices))
    models = [Path(args.model_dir) / name for name in trainer.get_model_names()]
    epoch = args.load_epoch
    if epoch is None and not all((folder / BEST_NAME).is_file() for folder in models):
        epoch = min(_last_epoch(folder) for folder in models)
    if models:
        trainer.load_model(args.model_dir, epoch=epoch)
    trainer.set_model_mode("eval")
    return trainer, list(trainer.lab2cname.values())


def _last_epoch(folder: Path) -> int:
    name = pointed_file(folder).name
    number = name.rpartition("-")[2]
    if name.startswith("model-step"):
        raise InputError(f"Expected a finished run in {folder.parent} but it was stopped: start its command again")
    if not number.isdecimal():
        raise InputError(
            f"Expected the checkpoint that {folder / 'checkpoint'} names to end in -<epoch> but got {name}"
        )
    return int(number)


def find_images(paths: Sequence[str]) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Return ((path, name) of every file to predict, folder -> why nothing was found in it).

    A file that `paths` names is taken, whatever its name. In folders, also linked ones, images are known by their
    extension. As in training, hidden files and what systems leave there are left out. Files of other kinds are left
    out, too, and their kinds are named.
    """
    found: list[tuple[str, str]] = []
    empty: dict[str, str] = {}
    for path in paths:
        if not os.path.isdir(path):
            found.append((path, os.path.basename(path)))
            continue
        others: Counter[str] = Counter()
        below = sorted(image_files.list_images_below(path, others))
        found += [(os.path.join(path, name), name) for name in below]
        if not below:
            beside = f"files of other kinds: {image_files.tell_kinds(others)}" if others else "none"
            empty[path] = f'Expected the folder "{path}" to hold images but found {beside}'
        elif others:
            print(
                f"left out, no images of a known kind, in {one_line(path)}: {image_files.tell_kinds(others)}",
                file=sys.stderr,
            )
    if len({name for _, name in found}) < len(found):  # two folders with the same names in them
        found = [(path, path) for path, _ in found]
    return found, empty


class _Images(Dataset[Any]):
    """A dataset of (number, image tensor) of each source, or (number, reason) where a file cannot be read."""

    def __init__(self, sources: Sequence[Source], transform: Any, least: int) -> None:
        self.sources, self.transform, self.least = sources, transform, least

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        source = self.sources[number]
        try:
            if isinstance(source, str):
                image_files.check_name(source, "the command line")
                source = read_image(source, self.least)
            return number, self.transform(source)
        except InputError as error:
            return number, str(error)


def read_batches(trainer: Any, sources: Sequence[Source], bar: bool = True) -> Iterator[tuple[Rows, dict[int, str]]]:
    """Yield batches of images: ((number, tensor [3, H, W]) of those that can be read, number -> reason of the others).

    Args:
        trainer: whose transform and batch size are used.
        sources: paths, and images in RGB.
        bar: whether to show progress where there are several batches.
    """
    cfg = trainer.cfg
    workers = usable_workers(cfg.DATALOADER.NUM_WORKERS) if len(sources) >= FEW_IMAGES else 0
    images = _Images(sources, build_transform(cfg, is_train=False), least_side(cfg, is_train=False))
    loader: DataLoader[Any] = DataLoader(
        images, batch_size=cfg.DATALOADER.TEST.BATCH_SIZE, num_workers=workers, collate_fn=list
    )
    for batch in progress_bar(loader, desc="predict", unit="batch", disable=not bar or len(loader) < 2, leave=False):
        good = [(number, image) for number, image in batch if not isinstance(image, str)]
        yield good, {number: image for number, image in batch if isinstance(image, str)}


@torch.no_grad()
def classify(
    model: Model, sources: Sequence[Source], head: str = "", bar: bool = True
) -> Iterator[tuple[list[int], Tensor, dict[int, str]]]:
    """Yield batches of images: (numbers and probabilities [B, C] of those that can be read, reasons of the others).

    Args:
        sources: paths, and images in RGB.
        head: which of the method's classifiers; "": the main one.
        bar: whether to show progress where there are several batches.
    """
    for good, bad in read_batches(model.trainer, sources, bar):
        numbers = [number for number, _ in good]
        rows = torch.zeros(0, len(model.names))
        if good:
            paths = [source if isinstance(source, str) else "" for source in (sources[number] for number in numbers)]
            heads = infer(model.trainer, torch.stack([image for _, image in good]), paths)
            logits = head_of(heads, head or main_head(model.trainer, heads)).float()
            rows = (logits / model.temperature).softmax(dim=1).cpu()
        yield numbers, rows, bad


def predict(
    model: Model, files: Sequence[tuple[str, str]], head: str | None = None
) -> tuple[list[Prediction], dict[str, str], str]:
    """Return (prediction of every file that can be read, path -> reason of the others, the head that was used)."""
    predictions: list[Prediction] = []
    unreadable: dict[str, str] = {}
    for numbers, rows, bad in classify(model, [path for path, _ in files], head or ""):
        unreadable.update((files[number][0], reason) for number, reason in bad.items())
        for number, row in zip(numbers, rows, strict=True):
            unknown = None if model.threshold is None else float(row.max()) < model.threshold
            predictions.append(Prediction(*files[number], row, unknown))
    return predictions, unreadable, str(head or model.trainer.main_head)


def head_of(heads: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the logits of a head.

    Raises:
        InputError: there is no such head.
    """
    if name not in heads:
        raise InputError(f'Expected --head to be one of {", ".join(heads)} but got "{name}"{did_you_mean(name, heads)}')
    return heads[name]


def main_head(trainer: Any, heads: Mapping[str, Tensor]) -> str:
    """Return the name of the head that a trainer's answers come from; a trainer that names none has its first."""
    return trainer.main_head or next(iter(heads))


def infer(trainer: Any, images: Tensor, paths: Sequence[str]) -> Mapping[str, Tensor]:
    """Return the logits [B, C] of every head for images [B, 3, H, W], through the methods that every trainer has."""
    nothing = torch.zeros(len(images), dtype=torch.long)
    input, _ = trainer.parse_batch_test({"img": images, "label": nothing, "domain": nothing, "impath": list(paths)})
    with trainer.precision.autocast():
        return as_heads(trainer.model_heads(input))

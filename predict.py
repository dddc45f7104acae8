"""Predict the classes of images with a model that train.py has trained.

    python predict.py --model-dir output/... IMAGE_OR_FOLDER... [--top-k 5] [--json | --csv] [--classes "a,b,c"]

The run's own folder is all that is needed: its config, its class names and its checkpoint; the images that it was
trained on are not. Folders are searched for images. The best classes of each image and their probabilities go to
stdout, everything else to stderr. `result.txt` has a line per image: its name and the numbers of its five best classes,
best first, counted from 0 in the order of the run's classes.json (or of --classes).

Exit codes: 0 done, also when some files could not be read (each is named); 2 something given was wrong, or no file at
all could be read (one line on stderr; --debug adds the traceback); 1 anything else (one line for a full memory).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from dassl.utils.cli import SETUP_ERRORS, Parser, fail, given_wrongly, parse_first, run_main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--model-dir", required=True, help="output folder of the training run")
    parser.add_argument("--load-epoch", type=int, help="epoch to load (default: the best one if kept, else the last)")
    parser.add_argument("--top-k", type=int, default=5, help="how many classes to show of each image (default: 5)")
    parser.add_argument("--head", help="which of the method's classifiers (default: the one that is its accuracy)")
    parser.add_argument("--classes", help='other class names, as "a,b,c" (a name with a comma in double quotes)')
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--csv", action="store_true", help="print CSV instead of a table")
    parser.add_argument("--output", help="folder for result.txt (default: MODEL_DIR/predictions)")
    parser.add_argument("--batch-size", type=int, help="images at a time (default: the run's for testing)")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="change a setting"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and more of what is done")
    args = parser.parse_args(argv)
    for flag in ("top_k", "batch_size"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            parser.error(f"Expected --{flag.replace('_', '-')} to be at least 1 but got {value}")
    return args


if __name__ == "__main__":
    parse_first(parse_args)

import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import datasets
import trainers
from dassl.config import CfgNode, get_cfg_default
from dassl.data.data_manager import usable_workers
from dassl.data.transforms import build_transform
from dassl.engine import TRAINER_REGISTRY, build_trainer
from dassl.engine.reliability.trouble import explain_trouble
from dassl.evaluation.passes import as_heads, progress_bar
from dassl.utils import (
    InputError,
    atomic_write,
    check_availability,
    did_you_mean,
    one_line,
    read_image,
)
from dassl.utils.checkpoints import BEST_NAME, pointed_file
from datasets.files import check_name, list_images_below, tell_kinds

logger = logging.getLogger("predict")

RESULT_CLASSES = 5  # of result.txt
FEW_IMAGES = 64  # fewer are read faster than reader processes start


class Prediction(NamedTuple):
    """What was found for one image."""

    path: str
    name: str  # relative to the folder given, or the file's name
    probabilities: Tensor  # [C]


# ------------------------------------------------------------------------------------------------------ the model


def load_cfg(args: argparse.Namespace) -> CfgNode:
    """The configuration of the run, for prediction."""
    path = Path(args.model_dir) / "config.yaml"
    if not path.is_file():
        raise InputError(f"Expected --model-dir to be the output folder of a run but there is no {path}")
    cfg = get_cfg_default()
    datasets.extend_cfg(cfg)
    trainers.extend_cfg(cfg)
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
    """(class names to predict, their positions among those trained on); names None: the run's folder does not say.

    The positions are None unless --classes names a part of the classes trained on.
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


class NoImages:
    """Stands in for a trainer's data manager: it knows the classes and has no images."""

    def __init__(self, names: Sequence[str], indices: list[int] | None) -> None:
        self.lab2cname = dict(enumerate(names))
        self.num_classes = len(names)
        self.num_source_domains = 0
        self.dataset = SimpleNamespace(
            classnames=list(names), lab2cname=self.lab2cname, num_classes=len(names), class_indices=indices,
            train_x=[], train_u=None, val=None, test=[],
        )  # fmt: skip
        self.train_loader_x = self.test_loader = (None,)  # their length counts: schedules are made of it
        self.train_loader_u = self.val_loader = None
        self.bad_images: dict[str, str] = {}


def without_images(trainer_class: type, names: Sequence[str], indices: list[int] | None) -> type:
    """The trainer class, with class names in the place of a dataset."""

    def build_data_loader(self: Any) -> None:
        self.dm = NoImages(names, indices)
        for name in ("train_loader_x", "train_loader_u", "val_loader", "test_loader"):
            setattr(self, name, getattr(self.dm, name))
        for name in ("num_classes", "num_source_domains", "lab2cname"):
            setattr(self, name, getattr(self.dm, name))

    return type(trainer_class.__name__, (trainer_class,), {"build_data_loader": build_data_loader})


def load_trainer(args: argparse.Namespace) -> tuple[Any, list[str]]:
    """The run's trainer with its checkpoint loaded, and the class names that it predicts.

    A trainer class that cannot be built without its training images says so with `needs_training_images = True`; then,
    and for runs that kept no class names, the run's dataset has to be where it was.
    """
    cfg = load_cfg(args)
    names, indices = class_list(args)
    check_availability(cfg.TRAINER.NAME, TRAINER_REGISTRY.registered_names())
    trainer_class = TRAINER_REGISTRY.get(cfg.TRAINER.NAME)
    if names is None or getattr(trainer_class, "needs_training_images", False):
        if args.classes is not None:
            raise InputError(f"Expected no --classes for {cfg.TRAINER.NAME}, which predicts the classes of its images")
        trainer = build_trainer(cfg)
    else:
        trainer = without_images(trainer_class, names, indices)(cfg)
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


# ------------------------------------------------------------------------------------------------------ the images


def find_images(paths: Sequence[str]) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """((path, name) of every file to predict, folder -> why nothing was found in it).

    Files that are named are taken whatever they are called; in folders, also linked ones, files are known by their
    extension; hidden ones and what systems leave there are left out, as in training, and files of other kinds named.
    """
    found: list[tuple[str, str]] = []
    empty: dict[str, str] = {}
    for path in paths:
        if not os.path.isdir(path):
            found.append((path, os.path.basename(path)))
            continue
        others: Counter[str] = Counter()
        below = sorted(list_images_below(path, others))
        found += [(os.path.join(path, name), name) for name in below]
        if not below:
            beside = f"files of other kinds: {tell_kinds(others)}" if others else "none"
            empty[path] = f'Expected the folder "{path}" to hold images but found {beside}'
        elif others:
            print(f"left out, no images of a known kind, in {one_line(path)}: {tell_kinds(others)}", file=sys.stderr)
    if len({name for _, name in found}) < len(found):  # two folders with the same names in them
        found = [(path, path) for path, _ in found]
    return found, empty


class _Images(Dataset[Any]):
    """(number, image tensor) of each file, or (number, reason) where it cannot be read."""

    def __init__(self, files: Sequence[tuple[str, str]], transform: Any) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[int, Any]:
        path = self.files[number][0]
        try:
            check_name(path, "the command line")
            return number, self.transform(read_image(path))
        except InputError as error:
            return number, str(error)


@torch.no_grad()
def predict(
    trainer: Any, files: Sequence[tuple[str, str]], head: str | None = None
) -> tuple[list[Prediction], dict[str, str], str]:
    """(prediction of every file that can be read, path -> reason of the others, the head that was used)."""
    cfg = trainer.cfg
    workers = usable_workers(cfg.DATALOADER.NUM_WORKERS) if len(files) >= FEW_IMAGES else 0
    images = _Images(files, build_transform(cfg, is_train=False))
    loader: DataLoader[Any] = DataLoader(
        images, batch_size=cfg.DATALOADER.TEST.BATCH_SIZE, num_workers=workers, collate_fn=list
    )
    predictions: list[Prediction] = []
    unreadable: dict[str, str] = {}
    used = str(head or getattr(trainer, "main_head", ""))
    for batch in progress_bar(loader, desc="predict", unit="batch", disable=len(loader) < 2, leave=False):
        unreadable.update((files[number][0], image) for number, image in batch if isinstance(image, str))
        good = [(number, image) for number, image in batch if not isinstance(image, str)]
        if not good:
            continue
        heads = infer(trainer, torch.stack([image for _, image in good]), [files[number][0] for number, _ in good])
        used = used or next(iter(heads))
        if used not in heads:
            raise InputError(
                f'Expected --head to be one of {", ".join(heads)} but got "{used}"{did_you_mean(used, heads)}'
            )
        for (number, _), row in zip(good, heads[used].float().softmax(dim=1).cpu(), strict=True):
            path, name = files[number]
            predictions.append(Prediction(path, name, row))
    return predictions, unreadable, used


def infer(trainer: Any, images: Tensor, paths: Sequence[str]) -> Mapping[str, Tensor]:
    """Images [B, 3, H, W] -> logits [B, C] of every head, through the methods that every trainer has."""
    nothing = torch.zeros(len(images), dtype=torch.long)
    input, _ = trainer.parse_batch_test({"img": images, "label": nothing, "domain": nothing, "impath": list(paths)})
    model_heads = getattr(trainer, "model_heads", None)
    with trainer.precision.autocast():
        return as_heads(trainer.model_inference(input) if model_heads is None else model_heads(input))


# ------------------------------------------------------------------------------------------------------ the answers


def best(prediction: Prediction, names: Sequence[str], count: int) -> list[dict[str, Any]]:
    """The `count` best classes: [{"class", "index", "probability"}], best first; equal ones in their order."""
    values, indices = prediction.probabilities.sort(descending=True, stable=True)
    return [
        {"class": names[index], "index": index, "probability": value}
        for value, index in zip(values[:count].tolist(), indices[:count].tolist(), strict=True)
    ]


def print_table(predictions: Sequence[Prediction], names: Sequence[str], count: int) -> None:
    rows = [
        [
            one_line(p.name),
            *(f"{one_line(guess['class'])} {100 * guess['probability']:.1f} %" for guess in best(p, names, count)),
        ]
        for p in predictions
    ]
    print(tabulate(rows, headers=["image", *map(str, range(1, min(count, len(names)) + 1))], disable_numparse=True))


def print_csv(predictions: Sequence[Prediction], names: Sequence[str], count: int) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    ranks = range(1, min(count, len(names)) + 1)
    writer.writerow(["path", *(f"{column}_{rank}" for rank in ranks for column in ("class", "probability"))])
    for p in predictions:
        guesses = best(p, names, count)
        writer.writerow([p.path, *(guess[key] for guess in guesses for key in ("class", "probability"))])


def print_json(
    predictions: Sequence[Prediction], names: Sequence[str], count: int, unreadable: Mapping[str, str], head: str
) -> None:
    content = {
        "head": head,
        "classes": list(names),
        "images": [{"path": p.path, "predictions": best(p, names, count)} for p in predictions],
        "unreadable": [{"path": path, "reason": reason} for path, reason in unreadable.items()],
    }
    print(json.dumps(content, indent=2))


def write_result(args: argparse.Namespace, predictions: Sequence[Prediction], names: Sequence[str]) -> None:
    """`result.txt`: "name index index index index index" per image; fewer where there are fewer classes."""
    path = Path(args.output or Path(args.model_dir) / "predictions") / "result.txt"
    try:
        with atomic_write(path) as stream:
            for p in predictions:
                stream.write(
                    " ".join([one_line(p.name), *(str(g["index"]) for g in best(p, names, RESULT_CLASSES))]) + "\n"
                )
    except OSError as error:
        message = f"Expected to write {path} but got: {error.strerror or error}. Choose another folder with --output"
        if args.output is not None:
            raise InputError(message) from error
        print(f"warning: {message}", file=sys.stderr)
    else:
        print(f"The five best classes of each image, by number: {path}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO if args.debug else logging.WARNING)  # to stderr
    try:
        with contextlib.redirect_stdout(sys.stderr):  # trainers may print; stdout is for the answers
            try:
                files, unreadable = find_images(args.images)
                if not files:
                    raise InputError(next(iter(unreadable.values())))
                trainer, names = load_trainer(args)
            except SETUP_ERRORS as error:
                if given_wrongly(error):
                    return fail(error, args.debug)
                raise
            predictions, bad, head = predict(trainer, files, args.head)
        unreadable |= bad
        for reason in unreadable.values():
            print(f"skipped: {one_line(reason)}", file=sys.stderr)
        if not predictions:
            raise InputError(f"Expected images that can be read but could read none of {len(files)}")
        write_result(args, predictions, names)
        if args.json:
            print_json(predictions, names, args.top_k, unreadable, head)
        elif args.csv:
            print_csv(predictions, names, args.top_k)
        else:
            print_table(predictions, names, args.top_k)
        sys.stdout.flush()
        if unreadable:
            print(f"{len(predictions)} images predicted, {len(unreadable)} skipped", file=sys.stderr)
    except InputError as error:
        return fail(error, args.debug)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = explain_trouble(error, batches="a smaller --batch-size")
        if args.debug or not message:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

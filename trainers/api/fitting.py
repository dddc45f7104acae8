"""From images to a trained classifier: choose, train, calibrate, report."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dassl.data.datasets import Datum
from dassl.engine import TRAINER_REGISTRY
from dassl.utils.logger import muted

from ..base import FeatureTrainer
from ..features import remembered_features
from .auto import Comparison, Score, add_learning_curve, compare, score
from .calibration import UnknownRule, calibrated_apart, calibration_error, fit_temperature, unknown_rule
from .folds import draw_folds, held_out_logits, without_classes
from .inspection import TEST, TRAINING, Photo
from .report import Report, make_report
from .runs import Choice, Runner, collect_logits, draw_validation, logits_of


@dataclass(frozen=True)
class Fitting:
    """A classifier with all that was found on the way to it.

    Attributes:
        trainer: the trained method.
        choice: its name and settings.
        config: short name of its configuration, or its file; "": it has none.
        class_names: as CLIP reads them, in the order of their labels.
        counts: label -> number of images to learn from.
        temperature: what logits are divided by.
        threshold: probability below which an image is of no known class; None: none was asked for.
        report: what was found.
        photos: those that it learnt from, and the folder's test photos.
        held_out: path of a photo -> logits [C] of the run that it was held out of.
    """

    trainer: Any
    choice: Choice
    config: str
    class_names: Sequence[str]
    counts: dict[int, int]
    temperature: float
    threshold: float | None
    report: Report
    photos: list[Photo]
    held_out: dict[str, Tensor]


def fit(
    runner: Runner,
    choice: Choice | None,
    items: list[Datum] | None,
    folder: str,
    output: str,
    share: float,
    *,
    files: bool,
    calibrate: bool,
    unknown: bool,
    time_limit: float | None,
) -> Fitting:
    """Choose a method unless one is given, train it on all images, and calibrate it.

    A method that is given is cross-validated where it is to be calibrated and learns on frozen features, in seconds.

    Args:
        runner: how to train.
        choice: the method; None: it is chosen.
        items: images to learn from; None: they are those of the folder.
        folder: a folder or CSV file of images; "": items are given.
        output: folder of the run's files.
        share: of the images that are taken for validation, where items are given.
        files: whether to write the run's files.
        calibrate: whether to fit a temperature.
        unknown: whether to find a threshold for images of no known class.
        time_limit: see `compare`.
    """
    known = items if items is not None else _of_folder(runner, choice, folder, output)
    comparison: Comparison | None = None
    with muted(logging.ERROR):  # the final run says once what these many runs would repeat
        if choice is None:
            comparison = compare(runner, known, output, share, time_limit)
            choice = comparison.chosen.choice
        elif calibrate and _in_seconds(choice):
            comparison = _cross_validated(runner, choice, known, output, share)
        if comparison is not None:
            add_learning_curve(runner, comparison, known, output, share)

    with remembered_features(random_views=False):  # the numbers are those of the same run on the command line
        if items is None:
            cfg = runner.configure(choice, folder, output)
            trainer = runner.train(cfg, None, files)
        else:
            cfg = runner.configure_quietly(choice, output)
            trainer = runner.train(cfg, (*draw_validation(items, share, runner.seed), []), files)
    # Held-out images where there are some; else the validation images, which no weight was trained on.
    logits, labels, folds = _held_out(comparison) or _validation(trainer)
    temperature = fit_temperature(logits, labels) if calibrate else 1.0
    with muted(logging.ERROR):
        rule = _unknown_rule(runner, choice, known, comparison, output, share, temperature) if unknown else None
    report = make_report(
        trainer,
        choice,
        known,
        comparison,
        temperature if calibrate else None,
        _errors(logits, labels, folds) if calibrate and len(labels) else None,
        rule,
        _tested(trainer) if items is None else None,
    )
    counts = dict(Counter(item.label for item in known))
    names = list(trainer.dm.dataset.classnames)
    photos = [Photo(item.impath, item.label, TRAINING) for item in known]
    if items is None:
        photos += [Photo(item.impath, item.label, TEST) for item in trainer.dm.dataset.test]
    apart: dict[str, Tensor] = {}
    if comparison is not None and comparison.chosen.logits is not None:
        rows = zip(known, comparison.chosen.logits, comparison.held.tolist(), strict=True)
        apart = {item.impath: row for item, row, held in rows if held}
    threshold = rule.threshold if rule else None
    return Fitting(
        trainer, choice, runner.config_of(choice), names, counts, temperature, threshold, report, photos, apart
    )


def _of_folder(runner: Runner, choice: Choice | None, folder: str, output: str) -> list[Datum]:
    """Return the images of a folder to learn from: those to train on, and those to choose settings on."""
    cfg = runner.configure(choice or Choice("ZeroshotCLIP"), folder, output)
    dataset = runner.data(cfg).dataset
    return [*dataset.train_x, *(dataset.val or ())]


def _in_seconds(choice: Choice) -> bool:
    """Return whether a method learns on frozen features, so that cross-validating it takes seconds."""
    return issubclass(TRAINER_REGISTRY.get(choice.method), FeatureTrainer)


def _cross_validated(runner: Runner, choice: Choice, items: list[Datum], output: str, share: float) -> Comparison:
    labels = torch.tensor([item.label for item in items])
    folds = draw_folds(labels.tolist(), runner.seed)
    held = folds >= 0
    found = Score(choice)
    if held.any():
        logits = held_out_logits(runner, runner.configure_quietly(choice, output), items, folds, share)
        found = score(choice, logits, labels, held)
    return Comparison(folds, labels, [found], found, f"{choice.shown} was asked for")


def _held_out(comparison: Comparison | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return logits, labels and folds of held-out images; None: there are none."""
    if comparison is None or comparison.chosen.logits is None or not comparison.held.any():
        return None
    held = comparison.held
    return comparison.chosen.logits[held], comparison.labels[held], comparison.folds[held]


def _validation(trainer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits and labels of the validation images, each image a fold of its own modulo five."""
    if trainer.val_loader is None:
        return torch.zeros(0, trainer.num_classes), torch.zeros(0, dtype=torch.long), torch.zeros(0)
    logits, labels = collect_logits(trainer, trainer.val_loader)
    return logits, labels, torch.arange(len(labels)) % 5


def _errors(logits: Tensor, labels: Tensor, folds: Tensor) -> tuple[float, float]:
    """Return the calibration error (percent) before and after, the latter with temperatures of other folds."""
    before = calibration_error(logits.softmax(dim=1), labels)
    if len(folds.unique()) < 2:
        return before, before
    return before, calibration_error(calibrated_apart(logits, labels, folds), labels)


def _unknown_rule(
    runner: Runner, choice: Choice, items: list[Datum], comparison: Comparison | None, output: str, share: float,
    temperature: float,
) -> UnknownRule | None:  # fmt: skip
    folds = draw_folds([item.label for item in items], runner.seed) if comparison is None else comparison.folds
    known, strange = without_classes(runner, runner.configure_quietly(choice, output), items, folds, share)
    if not known or not sum(map(len, known)) or not sum(map(len, strange)):
        return None

    def surest(groups: list[Tensor]) -> Tensor:
        return torch.cat([(logits.double() / temperature).softmax(dim=1).max(dim=1).values for logits in groups])

    return unknown_rule(surest(known), surest(strange))


def _tested(trainer: Any) -> tuple[float, int]:
    """Return the accuracy (percent) on the folder's test images, and their number."""
    logits, labels = logits_of(trainer)
    return 100 * float((logits.argmax(dim=1) == labels).double().mean()), len(labels)

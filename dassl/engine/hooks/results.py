"""The files that tell what a run was and what came out, and its closing lines."""

from __future__ import annotations

import datetime
import json
import logging
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dassl.data.data_manager import data_digest, dataset_of
from dassl.evaluation import HEAD_COLUMNS, heads_table
from dassl.evaluation.mistakes import EVAL_MISTAKES, MISTAKES, SHOWN, class_results
from dassl.evaluation.predictions import Predictions
from dassl.utils import InputError, atomic_write, one_line, take_log_name
from dassl.utils.checkpoints import POINTER_NAME
from dassl.utils.files import write_csv
from dassl.utils.logger import RESULT, warnings_so_far

from ..environment import describe
from .base import HookBase
from .checkpoint import BestModel
from .losses import Losses
from .timing import Timing

if TYPE_CHECKING:
    from dassl.engine.trainer import SimpleTrainer

logger = logging.getLogger(__name__)

METRICS, EVAL_METRICS, CONFIG, CLASSES, ENVIRONMENT, DONE = (
    "metrics.json",
    "metrics-eval.json",
    "config.yaml",
    "classes.json",  # class names in the order of their labels: with it, a run can be used without its images
    "environment.json",
    "DONE",
)
BAD_IMAGES = "bad_images.txt"
LABEL_NOISE = "label_noise.csv"
WORST_CLASSES = 5  # classes that the closing lines name


class Results(HookBase):
    """Write the records of a run.

    They are config.yaml, classes.json and environment.json at the start; metrics.json and, last of all, DONE at the
    end. If images were skipped because they could not be read, bad_images.txt lists them, one per line: path, tab,
    reason. If labels were made wrong on purpose, label_noise.csv lists them. Further CSV files are those that the
    method has (`run_tables`).

    When only evaluating, into a folder that holds a training run, write metrics-eval.json and leave the files of that
    run alone.
    """

    def __init__(self, timing: Timing, losses: Losses, best: BestModel) -> None:
        self._timing = timing
        self._losses = losses
        self._best = best
        self.aside = False  # whether the run only evaluates, in the folder of a training run

    def start(self, trainer: SimpleTrainer) -> None:
        folder = Path(trainer.output_dir)
        if trainer.writes_files:
            folder.mkdir(parents=True, exist_ok=True)
        training = trainer.phase != "idle"
        self.aside = not training and is_training_run(folder)
        if self.aside:
            return
        names = list(trainer.lab2cname.values())
        if is_training_run(folder):
            _check_same_classes(folder, names)
        if not trainer.writes_files:
            return
        (folder / DONE).unlink(missing_ok=True)
        with atomic_write(folder / CONFIG) as stream:
            stream.write(trainer.cfg.dump())
        _write_json(folder / CLASSES, names)
        _write_json(folder / ENVIRONMENT, describe(trainer.device))
        noise = getattr(trainer.dm, "noise", None)
        if noise is not None:
            write_csv(folder / LABEL_NOISE, noise.table())
        bad = getattr(trainer.dm, "bad_images", {})
        if bad:
            with atomic_write(folder / BAD_IMAGES) as stream:
                stream.writelines(f"{one_line(path)}\t{one_line(reason)}\n" for path, reason in bad.items())

    def finish(self, trainer: SimpleTrainer) -> None:
        if not trainer.writes_files:
            return
        folder = Path(trainer.output_dir)
        metrics = self.metrics(trainer)
        if not self.aside:
            for table, rows in trainer.run_tables().items():
                write_csv(folder / table, rows)
        name = EVAL_METRICS if self.aside else METRICS
        _write_json(folder / name, metrics)
        if not self.aside:
            take_log_name(folder)
        self._closing_lines(trainer, folder)
        if not self.aside:
            finished = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            _write_json(folder / DONE, {"finished": finished, "metrics": name})

    def metrics(self, trainer: SimpleTrainer) -> dict[str, Any]:
        """Return the content of metrics.json: percent and seconds, unrounded.

        The name of the evaluated split is one of its keys.
        """
        cfg, evaluation, dataset = trainer.cfg, trainer.evaluation, dataset_of(trainer.dm)
        noise = getattr(trainer.dm, "noise", None)
        training = trainer.phase != "idle"
        split = evaluation.split if evaluation is not None else cfg.TEST.SPLIT
        main = evaluation.heads.get(evaluation.main, {}) if evaluation is not None else {}
        return {
            "trainer": cfg.TRAINER.NAME,
            "recipe": trainer.recipe,
            "dataset": cfg.DATASET.NAME,
            "shots": cfg.DATASET.NUM_SHOTS,
            "train_images": count_images(trainer),
            "seed": cfg.SEED,
            "backbone": cfg.MODEL.BACKBONE.NAME,
            "mode": "train" if training else "eval",
            "epochs": trainer.max_epoch if training and trainer.has_training_step() else 0,
            "split": split,
            "split_digest": dataset.split_digest or None if dataset is not None else None,
            "data_digest": data_digest(trainer.dm) or None,
            "accuracy": main.get("accuracy"),
            split: {
                "heads": evaluation.heads if evaluation is not None else {},
                "main": evaluation.main if evaluation is not None else None,
                "n": evaluation.n if evaluation is not None else 0,
                **({"heads_kway": evaluation.heads_kway} if evaluation is not None and evaluation.heads_kway else {}),
            },
            "bad_images": len(getattr(trainer.dm, "bad_images", {})),
            "selected": self.selected(trainer),
            **({} if noise is None else {"label_noise": noise.notes()}),
            **trainer.run_notes(),
            "train": self._losses.means,
            **({"skipped_steps": self._losses.skipped} if self._losses.skipped else {}),
            "params": count_parameters(trainer),
            "timing": self._timing.summary(),
        }

    def selected(self, trainer: SimpleTrainer) -> dict[str, dict[str, Any]]:
        """Return what was chosen, and on which data: the best epoch, and what the method says of itself."""
        return {**self._best.choice, **trainer.selected}

    def _closing_lines(self, trainer: SimpleTrainer, folder: Path) -> None:
        evaluation = trainer.evaluation
        if evaluation is not None and all(set(HEAD_COLUMNS) <= set(v) for v in evaluation.heads.values()):
            logger.info("%s", heads_table(evaluation.heads, evaluation.main), extra=RESULT)
            if evaluation.heads_kway:
                logger.info("These %d classes taken as new ones:", len(trainer.lab2cname), extra=RESULT)
                logger.info("%s", heads_table(evaluation.heads_kway, evaluation.main), extra=RESULT)
        for name, choice in self.selected(trainer).items():
            value = choice.get("value")
            shown = f"{value:.4g}" if isinstance(value, float) else value
            logger.info("Selected %s = %s (on %s)", name, shown, choice.get("on"), extra=RESULT)
        if evaluation is not None and evaluation.predictions is not None:
            self._say_mistakes(evaluation.predictions, folder)
        logger.info("Output folder: %s", folder, extra=RESULT)
        if (folder / "tensorboard").is_dir():
            logger.info("Curves and pictures: tensorboard --logdir %s", shlex.quote(str(folder / "tensorboard")))
        warnings = warnings_so_far()
        if warnings:  # they may stand hundreds of lines above
            logger.info("Warnings of this run:%s", "".join(f"\n* {warning}" for warning in warnings))

    def _say_mistakes(self, predictions: Predictions, folder: Path) -> None:
        wrong = int((~predictions.correct(predictions.main)).sum())
        if not wrong:
            return
        worst = [result for result in class_results(predictions) if result.correct < result.total][:WORST_CLASSES]
        logger.info("Worst classes:%s", "".join(f"\n* {result}" for result in worst), extra=RESULT)
        table = folder / (EVAL_MISTAKES if self.aside else MISTAKES)
        logger.info(
            "Wrong: %s of %s images, the surest first in %s, the first %d as pictures in %s",
            f"{wrong:,}",
            f"{len(predictions.labels):,}",
            table,
            min(wrong, SHOWN),
            table.with_suffix(".png"),
            extra=RESULT,
        )


def is_training_run(folder: Path) -> bool:
    """Return whether a training run, finished or not, has left checkpoints in this folder."""
    return any(folder.glob(f"*/{POINTER_NAME}"))


def _check_same_classes(folder: Path, names: list[str]) -> None:
    # A run that goes on with other classes would fail, or mislabel. Say so before its records are written over.
    try:
        earlier = json.loads((folder / CLASSES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # the earlier run was made without that file
    if earlier != names:
        raise InputError(
            f'Expected the run in "{folder}" to go on with the {len(earlier)} classes it has been trained on but the '
            f"dataset now has {len(names)}, of which some differ: choose another OUTPUT_DIR (--output-dir)"
        )


def count_images(trainer: SimpleTrainer) -> dict[str, int] | None:
    """Count the training images there are: in all, of the smallest and of the largest class; None: no dataset.

    A class may have fewer images than DATASET.NUM_SHOTS asks for.
    """
    dataset = dataset_of(trainer.dm)
    if dataset is None or not dataset.train_x:
        return None
    items = dataset.train_x
    counts = Counter(item.label for item in items)
    return {"total": len(items), "fewest_per_class": min(counts.values()), "most_per_class": max(counts.values())}


def count_parameters(trainer: SimpleTrainer) -> dict[str, int]:
    """Count the parameters of all modules that a trainer holds, each once: the trained ones, and all of them.

    Numbers that a solver fits without gradients are buffers; a trainer tells their count as ``fitted_parameters``.
    """
    parameters = {id(p): p for module in _modules(trainer) for p in module.parameters()}
    return {
        "trainable": sum(p.numel() for p in parameters.values() if p.requires_grad) + trainer.fitted_parameters,
        "total": sum(p.numel() for p in parameters.values()) + trainer.fitted_parameters,
    }


def _modules(trainer: SimpleTrainer) -> Iterator[nn.Module]:
    """Yield registered models, modules among the trainer's attributes, and modules in attributes of those.

    A frozen backbone is often kept in a plain attribute or a list, so that it stays out of the state dict.
    """
    roots = [model for model in trainer._models.values() if model is not None] + list(_held(trainer))
    for root in roots:
        yield root
        for module in root.modules():
            yield from _held(module)


def _held(owner: Any) -> Iterator[nn.Module]:
    for value in vars(owner).values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, nn.Module):
                yield item


def _write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as stream:
        json.dump(content, stream, indent=2)
        stream.write("\n")

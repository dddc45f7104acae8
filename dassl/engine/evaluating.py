"""Evaluate a trainer: one pass over a split, for all of its heads."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from dassl.data.data_manager import dataset_of
from dassl.data.loaders import part_of
from dassl.evaluation import heads_table
from dassl.evaluation.passes import Evaluation, as_heads, run_pass
from dassl.evaluation.predictions import MEGABYTE, Recorder
from dassl.utils import InputError, check_availability
from dassl.utils.logger import DETAIL

from .base import TrainerBase
from .hooks.tensorboard import group_of

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 8  # test images shown in TensorBoard


class EvaluatingTrainer(TrainerBase):
    """Evaluate all heads of a method on a split."""

    val_loader: Any
    test_loader: Any
    lab2cname: dict[int, str]

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[tuple[Any, Any]] = []  # evaluation loaders, and this process's parts of them

    @torch.no_grad()
    def test(self, split: str | None = None) -> float:
        """Evaluate all heads in one pass and return the main head's accuracy (percent, unrounded).

        If called outside of ``train`` (evaluation only), it also writes the run's result files.

        Args:
            split: "test" or "val"; None: TEST.SPLIT.

        Raises:
            InputError: the dataset has no such split; test images never stand in for a missing validation set.
        """
        split = self.cfg.TEST.SPLIT if split is None else split
        check_availability(split, ("test", "val"))
        loader = self._part_of(self._loader_of(split, f'test("{split}")'))
        alone = self.phase == "idle"
        if alone:
            self.call_hooks("start")
        self.set_model_mode("eval")
        self.evaluator.reset()
        logger.info("Evaluate on the *%s* set", split, extra=DETAIL)
        evaluation = Evaluation(split, self.main_head)
        limit = 0 if self.phase == "train" else self.cfg.TEST.PREDICTIONS_MB * MEGABYTE
        recorder = Recorder(len(getattr(loader, "dataset", ())), limit, self.cfg.SEED) if limit else None
        run_pass(
            loader,
            lambda batch: self._infer(batch, recorder),
            evaluation,
            self.evaluator.process,
            num_examples=NUM_EXAMPLES if self.phase == "final" else 0,
            keep_bar=self.phase != "train",
            recorder=recorder,
        )
        if recorder is not None:
            evaluation.predictions = recorder.finish(split, evaluation.main, self.reference_head, self.lab2cname)
        evaluation.heads_kway = self._heads_kway(loader, evaluation)
        results = self.evaluator.evaluate()
        if self.phase == "train" and len(evaluation.heads) > 1:  # otherwise the closing lines have the table
            logger.info("%s", heads_table(evaluation.heads, evaluation.main), extra=DETAIL)
        self.evaluation = evaluation
        for name, value in results.items():
            self.write_scalar(f"{group_of(self.phase)}{split}/{name}", value, self.epoch)
        self.call_hooks("after_test", evaluation)
        if alone:
            self.call_hooks("finish")
        return next(iter(results.values()))

    def _heads_kway(self, loader: Any, evaluation: Evaluation) -> dict[str, dict[str, float]]:
        """Return metrics by head with the dataset's k classes taken as new ones.

        This is for datasets whose classes are a part of those trained on; for all others the result is empty. Shifted
        test sets often hold only some of the classes (ImageNet-A and -R 200 of 1000). Published numbers for them
        rebuild the classifier for those k names, as is done here. ``evaluation.heads`` has the numbers of the trained
        classifier with its columns cut to these classes.
        """
        dataset: Any = dataset_of(self.dm)
        indices = None if dataset is None else dataset.class_indices
        if indices is None or not self.bind_classes(dataset.classnames, indices):
            return {}
        self.bind_classes(dataset.classnames, None)
        kway = Evaluation(evaluation.split, evaluation.main)
        run_pass(loader, self._infer, kway, lambda logits, labels: None, keep_bar=False)
        self.bind_classes(dataset.classnames, indices)
        return kway.heads

    def _part_of(self, loader: Any) -> Any:
        """Return this process's part of an evaluation loader.

        Each part is made only once, so that its worker processes are kept.
        """
        for whole, part in self._parts:
            if whole is loader:
                return part
        self._parts.append((loader, part_of(loader)))
        return self._parts[-1][1]

    def _loader_of(self, split: str, asked_by: str) -> Any:
        loader = self.val_loader if split == "val" else self.test_loader
        if loader is None:
            raise InputError(f"Expected a {split} set for {asked_by} but the dataset {self.cfg.DATASET.NAME} has none")
        return loader

    def _infer(self, batch: Any, recorder: Recorder | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Return logits [B, C] by head, and labels [B], of a test batch.

        Paths, values and features of the batch go to the recorder, if one is given.
        """
        input, label = self.parse_batch_test(batch)
        with self.precision.autocast():
            report = {"heads": self.model_heads(input)} if recorder is None else self.model_report(input)
        if recorder is not None:
            paths = batch.get("impath") if isinstance(batch, dict) else None
            recorder.tell(paths, report.get("values"), report.get("features"))
        return as_heads(report["heads"]), label

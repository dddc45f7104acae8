"""The evaluator that a trainer feeds batch by batch; it logs upstream's result block, which result parsers read."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dassl.upstream_names import upstream_name
from dassl.utils import InputError, atomic_write, distributed
from dassl.utils.logger import DETAIL

from .build import EVALUATOR_REGISTRY
from .heads import check_logits, macro_f1, new_confusion

logger = logging.getLogger(__name__)


class EvaluatorBase:
    """The interface of an evaluator: ``reset``, ``process`` per batch, ``evaluate`` at the end."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def reset(self) -> None:
        """Forget what was processed."""
        raise NotImplementedError

    def process(self, mo: Tensor, gt: Tensor) -> None:
        """Add a batch of model outputs and ground truth."""
        raise NotImplementedError

    def evaluate(self) -> OrderedDict[str, float]:
        """Return results by name; the first is the one that ``Trainer.test`` returns."""
        raise NotImplementedError


@EVALUATOR_REGISTRY.register()
class Classification(EvaluatorBase):
    """Accuracy, error rate, macro-F1 over labels that occur, and optionally per-class accuracy; all in percent.

    Args:
        cfg: ``TEST.PER_CLASS_RESULT`` and ``TEST.COMPUTE_CMAT`` switch the extras on; ``OUTPUT_DIR`` takes cmat.pt.
        lab2cname: label -> class name, needed for per-class results.
    """

    def __init__(self, cfg: Any, lab2cname: Mapping[int, str] | None = None, **kwargs: Any) -> None:
        super().__init__(cfg)
        if cfg.TEST.PER_CLASS_RESULT and lab2cname is None:
            raise InputError("Expected lab2cname for TEST.PER_CLASS_RESULT but got None")
        self._lab2cname = lab2cname
        self.reset()

    def reset(self) -> None:
        """Forget what was processed."""
        self._confusion: Any = None  # made at the first batch, which tells the number of classes and the device

    def process(self, mo: Tensor, gt: Tensor) -> None:
        """Add a batch: logits ``mo`` [B, C], labels ``gt`` [B]."""
        check_logits(mo, gt)
        if self._confusion is None:
            self._confusion = new_confusion(mo.shape[1], mo.device)
        self._confusion.update(mo.detach().argmax(1), gt)

    def counts(self) -> Tensor | None:
        """Return the confusion counts [C, C], rows true, of what was processed; None: nothing was."""
        return None if self._confusion is None else self._confusion.compute().cpu()

    def evaluate(self) -> OrderedDict[str, float]:
        """Log the result block and return the unrounded percentages."""
        counts = self.counts()
        if counts is None:
            raise InputError("Expected at least one batch to evaluate but got none")
        total, correct = int(counts.sum()), int(counts.diag().sum())
        accuracy = 100.0 * correct / total
        results = OrderedDict(accuracy=accuracy, error_rate=100.0 - accuracy, macro_f1=macro_f1(counts))
        logger.info(
            "=> result\n* total: %s\n* correct: %s\n* accuracy: %.1f%%\n* error: %.1f%%\n* macro_f1: %.1f%%",
            f"{total:,}",
            f"{correct:,}",
            accuracy,
            results["error_rate"],
            results["macro_f1"],
            extra=DETAIL,
        )
        if self.cfg.TEST.PER_CLASS_RESULT:
            results["perclass_accuracy"] = self._per_class(counts)
        if self.cfg.TEST.COMPUTE_CMAT and distributed.is_main():
            self._save_confusion(counts)
        return results

    def _per_class(self, counts: Tensor) -> float:
        """Log a line per class that occurs, and return their unweighted mean accuracy."""
        logger.info("=> per-class result")
        accuracies = []
        for label in counts.sum(1).nonzero().flatten().tolist():
            total, correct = int(counts[label].sum()), int(counts[label, label])
            accuracies.append(100.0 * correct / total)
            name = (self._lab2cname or {}).get(label, "?")
            logger.info(
                "* class: %d (%s)\ttotal: %s\tcorrect: %s\tacc: %.1f%%",
                label,
                name,
                f"{total:,}",
                f"{correct:,}",
                accuracies[-1],
            )
        mean = sum(accuracies) / len(accuracies)
        logger.info("* average: %.1f%%", mean)
        return mean

    def _save_confusion(self, counts: Tensor) -> None:
        """Write cmat.pt: float64 [C, C], rows divided by the class's size (a class that does not occur: zeros).

        Upstream writes a NumPy array, which the safe way to load a file refuses; this is a tensor.
        """
        matrix = counts.double()
        path = Path(self.cfg.OUTPUT_DIR) / "cmat.pt"
        with atomic_write(path, "wb") as stream:
            torch.save(matrix / matrix.sum(1, keepdim=True).clamp(min=1), stream)
        logger.info("Confusion matrix is saved to %s", path)


def __getattr__(name: str) -> Any:  # names that upstream's module offers, too
    return upstream_name(__name__, name)

"""Metrics of one classification head, by torchmetrics.

torchmetrics would add up what several processes have counted. This is switched off, because here each process counts
all images: the logits are gathered batch by batch (see run_pass in dassl/evaluation/passes.py).

Shapes: B images in a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tabulate import tabulate
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassStatScores,
)

HEAD_COLUMNS = ("accuracy", "top5", "macro_f1", "ece")  # every one in percent
CALIBRATION_BINS = 15


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Raise unless logits are [B, C] without NaN and labels are [B] in 0..C-1."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"Expected logits [B, C] and labels [B] but got shapes {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]):
        raise ValueError(
            f"Expected labels in 0..{logits.shape[1] - 1}, one per column of the logits, "
            f"but got {int(labels.min())}..{int(labels.max())}"
        )
    if torch.isnan(logits).any():
        raise FloatingPointError("Expected logits without NaN but got some")


def new_confusion(num_classes: int, device: torch.device) -> MulticlassConfusionMatrix:
    """Create a metric of counts [C, C], rows true, columns predicted.

    A one-class problem gets an empty second class.
    """
    classes = max(num_classes, 2)
    return MulticlassConfusionMatrix(num_classes=classes, validate_args=False, sync_on_compute=False).to(device)


def macro_f1(confusion: Tensor) -> float:
    """Return the mean F1 (in percent) over the classes that occur as labels.

    Args:
        confusion: counts [C, C], rows true, columns predicted.
    """
    counts = confusion.double()
    support = counts.sum(1)  # [C]
    f1 = 2 * counts.diag() / (support + counts.sum(0)).clamp(min=1)  # 2 TP / (2 TP + FN + FP)
    return 100.0 * float(f1[support > 0].mean())


class HeadMetrics:
    """Accuracy, top-5 accuracy, macro-F1 and expected calibration error of one head over a split.

    The counts are whole numbers and the percentages are taken from them in double precision, so nothing is rounded.
    With fewer than five classes, top5 counts the best C, which is always right.

    Args:
        num_classes: C.
        device: where the logits are.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        width = max(num_classes, 2)
        self._confusion = new_confusion(num_classes, torch.device(device))
        self._others = MetricCollection(
            {
                "top5": MulticlassStatScores(
                    num_classes=width, top_k=min(5, width), average="micro", validate_args=False, sync_on_compute=False
                ),
                "ece": MulticlassCalibrationError(
                    num_classes=width,
                    n_bins=CALIBRATION_BINS,
                    norm="l1",
                    validate_args=False,
                    sync_on_compute=False,
                ),
            },
            compute_groups=False,
        ).to(device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits [B, C] (any float type), labels [B]."""
        check_logits(logits, labels)
        probabilities = logits.detach().float().softmax(1)  # [B, C]
        if self.num_classes == 1:
            probabilities = torch.nn.functional.pad(probabilities, (0, 1))
        # The arg-max is that of the logits: in the probabilities, near ties round to ties.
        self._confusion.update(logits.detach().argmax(1), labels)
        self._others.update(probabilities, labels)

    def confusion(self) -> Tensor:
        """Return counts [C, C] on the CPU, rows true, columns predicted."""
        return self._confusion.compute().cpu()[: self.num_classes, : self.num_classes]

    def compute(self) -> dict[str, float]:
        """Return percentages by name, in the order of HEAD_COLUMNS."""
        confusion = self.confusion()
        total = int(confusion.sum())
        others = self._others.compute()
        true_positives = int(others["top5"][0])
        return {
            "accuracy": 100.0 * int(confusion.diag().sum()) / total,
            "top5": 100.0 * true_positives / total,
            "macro_f1": macro_f1(confusion),
            "ece": 100.0 * float(others["ece"]),
        }


def heads_table(heads: Mapping[str, Mapping[str, float]], main: str) -> str:
    """Return a console table of all heads, in percent; the head that counts as the method's accuracy is marked."""
    rows = [
        [f"{name} (main)" if name == main else name, *(f"{values[column]:.2f}" for column in HEAD_COLUMNS)]
        for name, values in heads.items()
    ]
    headers = ["head", "accuracy %", "top-5 %", "macro F1 %", "ECE %"]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", *["right"] * len(HEAD_COLUMNS)))

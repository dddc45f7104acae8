"""Choose a method for the images at hand, by cross-validation on features that are computed once.

Legend: N images, C classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional as F

from dassl.data.datasets import Datum
from dassl.engine import TRAINER_REGISTRY

from .folds import draw_folds, held_out_logits, numbers_of
from .runs import Choice, Parts, Runner, draw_validation

FREE = ("TRAINER.DLRCLIP.CMA", False), ("TRAINER.DLRCLIP.GLR", False)
# All of them learn on features of the images as they are, so that each image is encoded once, and once more for the
# patches that DLR-CLIP compares.
CANDIDATES = (
    Choice("ZeroshotCLIP"),
    Choice("TipAdapter", settings=(("TRAINER.TIPADAPTER.VIEWS", 0),)),
    Choice("GDA", settings=(("TRAINER.GDA.VIEWS", 0),)),
    Choice("LPPlusPlus", settings=(("TRAINER.LPPLUSPLUS.VIEWS", 0),)),
    Choice("LinearProbe", "_text", (("TRAINER.LINEARPROBE.VIEWS", 0),)),
    Choice("DLRCLIP", "_plus", (*FREE, ("TRAINER.DLRCLIP.MIXTURE.VIEWS", 0)), "DLRCLIP (training-free)"),
)
ADAPTED = (Choice("DLRCLIP", "_plus", name="DLRCLIP (adapted)"),)  # tried where there is time for them
FIRST_CHOICE = CANDIDATES[3]  # LP++, where no image can be held out: the best with one image on development data
DEFAULT = CANDIDATES[-1]  # on development data: the best on average, and never far behind
AHEAD = 2.0  # standard errors by which another method must be ahead of it
PROBED_STEPS = 3


@dataclass(frozen=True)
class Score:
    """Hold the results of a method on held-out images.

    Attributes:
        choice: the method.
        logits: [N, C], NaN where an image was never held out.
        accuracy: percent of the held-out images; NaN where there are none.
        loss: their mean cross-entropy.
        seconds: that this took.
        skipped: why it was not tried; "": it was.
    """

    choice: Choice
    logits: Tensor | None = None
    accuracy: float = float("nan")
    loss: float = float("nan")
    seconds: float = 0.0
    skipped: str = ""


@dataclass
class Comparison:
    """Hold the results of a cross-validation.

    Attributes:
        folds: [N], see `draw_folds`.
        labels: [N].
        scores: of each method.
        chosen: the score of the method that is taken.
        why: a sentence.
        curve: images of each class in training -> accuracy of the chosen method on held-out images, in percent.
        learns: whether the chosen method learns anything from the images.
    """

    folds: Tensor
    labels: Tensor
    scores: list[Score]
    chosen: Score
    why: str
    curve: dict[float, float] = field(default_factory=dict)
    learns: bool = True

    @property
    def held(self) -> Tensor:
        """A mask [N] of the images that were held out."""
        return self.folds >= 0


def score(choice: Choice, logits: Tensor, labels: Tensor, held: Tensor, seconds: float = 0.0) -> Score:
    """Return the score of logits [N, C] on the images that were held out."""
    if not held.any():
        return Score(choice, logits, seconds=seconds)
    known, truth = logits[held], labels[held]
    right = 100 * float((known.argmax(dim=1) == truth).double().mean())
    return Score(choice, logits, right, float(F.cross_entropy(known, truth)), seconds)


def choose(scores: Sequence[Score], labels: Tensor, held: Tensor) -> tuple[Score, str]:
    """Return the method to take, and a sentence that says why.

    It is DLR-CLIP's training-free form, unless the most accurate method is ahead of it by more than two standard
    errors of the mean difference between them, image by image. Of equally accurate methods the one with the higher
    likelihood counts as the more accurate.

    Args:
        scores: those of all methods that were tried, `DEFAULT` among them.
        labels, held: [N].
    """
    best = max(scores, key=lambda one: (one.accuracy, -one.loss))
    default = next(one for one in scores if one.choice.shown == DEFAULT.shown)
    if best is default:
        return best, f"{best.choice.shown} was best on held-out images"
    apart = _right(best, labels, held) - _right(default, labels, held)
    if len(apart) > 1 and float(apart.mean()) > AHEAD * float(apart.std()) / math.sqrt(len(apart)):
        return best, f"{best.choice.shown} was certainly better on held-out images than {default.choice.shown}"
    return default, (
        f"{default.choice.shown} is taken, because no method was certainly better on held-out images; "
        f"{best.choice.shown} reached {best.accuracy:.1f} % there"
    )


def _right(one: Score, labels: Tensor, held: Tensor) -> Tensor:
    assert one.logits is not None
    return (one.logits[held].argmax(dim=1) == labels[held]).double()


def compare(
    runner: Runner, items: Sequence[Datum], output: str, share: float, time_limit: float | None = None
) -> Comparison:
    """Compare the candidates by cross-validation on N images, and choose one.

    Args:
        runner: how to train.
        items: N images, with labels 0 to C - 1.
        output: a folder for what runs may write.
        share: of the training images that are taken for validation, where a class has enough.
        time_limit: seconds for methods that train within the encoders; None: they are not tried.
    """
    labels = torch.tensor([item.label for item in items])
    folds = draw_folds(labels.tolist(), runner.seed)
    held, began = folds >= 0, time.monotonic()
    if not held.any():
        return Comparison(
            folds, labels, [], Score(FIRST_CHOICE),
            f"with one image of each class none can be held out: {FIRST_CHOICE.shown} is taken unseen",
        )  # fmt: skip
    trials = _Trials(runner, items, folds, labels, share, output)
    scores = [trials.score(choice) for choice in CANDIDATES]
    if time_limit is not None:
        for choice in ADAPTED:
            scores.append(trials.score_in_time(choice, time_limit - (time.monotonic() - began)))
    chosen, why = choose([one for one in scores if not one.skipped], labels, held)
    return Comparison(folds, labels, scores, chosen, why)


@dataclass(frozen=True)
class _Trials:
    """Cross-validate methods on the same folds; for the fields see `compare`."""

    runner: Runner
    items: Sequence[Datum]
    folds: Tensor
    labels: Tensor
    share: float
    output: str

    def score(self, choice: Choice) -> Score:
        """Return the score of a method; where classes have unequal numbers of images, each counts the same."""
        began = time.monotonic()
        choice = balanced(choice, self.labels)
        cfg = self.runner.configure_quietly(choice, self.output)
        logits = held_out_logits(self.runner, cfg, self.items, self.folds, self.share)
        return score(choice, logits, self.labels, self.folds >= 0, time.monotonic() - began)

    def score_in_time(self, choice: Choice, left: float) -> Score:
        """Return the score of a method that trains within the encoders, if its runs fit into the seconds left."""
        cfg = self.runner.configure_quietly(choice, self.output)
        if TRAINER_REGISTRY.get(choice.method).why_not_on(cfg):
            return Score(choice, skipped="needs a plain CLIP, whose blocks it adapts")
        parts: Parts = (*draw_validation(self.items, self.share, self.runner.seed), [])
        runs = len(numbers_of(self.folds)) + 1  # the folds, and the final run
        needed = runs * seconds_of_training(self.runner.build(cfg, parts))
        if needed > left:
            return Score(choice, skipped=f"needs about {needed:.0f} s, and {max(left, 0):.0f} s are left")
        return self.score(choice)


def balanced(choice: Choice, labels: Tensor) -> Choice:
    """Return a choice whose loss counts each class the same, where classes have unequal numbers of images.

    A method that is not trained by a loss over images stays as it is.
    """
    unequal = len(labels.bincount().unique()) > 1
    method = TRAINER_REGISTRY.get(choice.method)
    if not unequal or not (method.cross_entropy or method.weighs_classes):
        return choice
    return replace(choice, settings=(("OPTIM.CLASS_WEIGHTS", "balanced"), *choice.settings))


def seconds_of_training(trainer: Any) -> float:
    """Estimate the seconds that a trainer's run will take, from a few steps of it, which change the trainer."""
    trainer.set_model_mode("train")
    trainer.num_batches, seconds = trainer.count_batches(), []
    for number, batches in enumerate(trainer.train_batches()):
        began = time.monotonic()
        trainer.batch_idx = number
        trainer.guard.begin()
        trainer.forward_backward(*batches)
        seconds.append(time.monotonic() - began)
        if number + 1 == PROBED_STEPS:
            break
    trainer.guard.end()
    return min(seconds) * trainer.num_batches * trainer.max_epoch


def add_learning_curve(
    runner: Runner, comparison: Comparison, items: Sequence[Datum], output: str, share: float
) -> None:
    """Add the accuracy of the chosen method with a half and a quarter of the images to what was found, in place."""
    held, labels, chosen = comparison.held, comparison.labels, comparison.chosen
    cfg = runner.configure_quietly(chosen.choice, output)
    comparison.learns = TRAINER_REGISTRY.get(chosen.choice.method).trains(cfg)
    if not held.any() or not comparison.learns:
        return
    folds = len(numbers_of(comparison.folds))
    full = len(items) / len(set(labels.tolist())) * (1 - 1 / folds)
    for size in sorted({int(full / 4), int(full / 2)} - {0}):
        logits = held_out_logits(runner, cfg, items, comparison.folds, share, size)
        comparison.curve[float(size)] = score(chosen.choice, logits, labels, held).accuracy
    comparison.curve[full] = chosen.accuracy


def gain_of_doubling(curve: dict[float, float]) -> float | None:
    """Return how many points twice as many images would bring, by a learning curve; None: it has one point.

    The gain of the last doubling is taken to shrink as the one before it did, and no more than half of the errors that
    are left can go.
    """
    sizes = sorted(curve)
    gains = [(curve[more] - curve[less]) / math.log2(more / less) for less, more in zip(sizes, sizes[1:], strict=False)]
    if not gains:
        return None
    last = max(0.0, gains[-1])
    shrinks = min(1.0, last / gains[-2]) if len(gains) > 1 and gains[-2] > 0 else 0.7
    return min(last * shrinks, (100 - curve[sizes[-1]]) / 2)


def interval(accuracy: float, n: int) -> tuple[float, float]:
    """Return the 95 % confidence interval (Wilson) of an accuracy in percent that was measured on n images."""
    found = binomtest(round(accuracy * n / 100), n).proportion_ci(0.95, method="wilson")
    return 100 * float(found.low), 100 * float(found.high)

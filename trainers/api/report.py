"""Report what a classifier is expected to do on new images, as text and as a small page in a notebook."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from typing import Any

from tabulate import tabulate

from dassl.data.datasets import Datum

from .auto import Comparison, Score, gain_of_doubling, interval
from .calibration import UnknownRule
from .runs import Choice


def estimate(comparison: Comparison) -> tuple[float, float, float]:
    """Return the accuracy to be expected of the chosen method on new images, and a 95 % interval, in percent.

    Accuracy on held-out images is that of a classifier with fewer training images; the learning curve says what the
    others bring. Where no image can be held out, nothing is known: NaN, 0 and 100.
    """
    n = int(comparison.held.sum())
    accuracy = comparison.chosen.accuracy
    if not n or math.isnan(accuracy):
        return float("nan"), 0.0, 100.0
    if not comparison.learns:
        return accuracy, *interval(accuracy, n)
    folds = len(comparison.folds[comparison.held].unique())
    more = math.log2(folds / (folds - 1))  # doublings from the folds' training images to all of them
    gain = gain_of_doubling(comparison.curve)
    low, high = interval(accuracy, n)
    if gain is None:  # the gain can be anything up to half of the errors that are left
        return accuracy, low, high + more * (100 - high) / 2
    shift = more * gain
    return accuracy + shift, low, min(100.0, high + 2 * shift)


@dataclass(frozen=True)
class Report:
    """Hold the findings of a fit. The report prints as text, and shows itself as a table in a notebook.

    Attributes:
        method: what is used.
        classes, images: numbers of classes, and of images to learn from.
        facts: rows (name, value) of all that is known, for people.
        sentences: what follows from it.
        methods: rows (method, accuracy on held-out images in percent, seconds, note) of all that were compared.
        accuracy: expected on new images, in percent; None: not known.
        low, high: 95 % interval of it.
        test_accuracy: on the folder's test images, in percent; None: there are none.
        ece_before, ece_after: calibration error on held-out images before and after the temperature, in percent.
        auroc, fpr95: how well images of no known class are told apart, in percent; None: not asked for.
    """

    method: str
    classes: int
    images: int
    facts: tuple[tuple[str, str], ...] = ()
    sentences: tuple[str, ...] = ()
    methods: tuple[tuple[str, str, str, str], ...] = ()
    accuracy: float | None = None
    low: float = 0.0
    high: float = 100.0
    test_accuracy: float | None = None
    ece_before: float | None = None
    ece_after: float | None = None
    auroc: float | None = None
    fpr95: float | None = None

    def __str__(self) -> str:
        """Return the report as text."""
        parts = [tabulate(self.facts, tablefmt="plain", disable_numparse=True)]
        if self.methods:
            parts.append(tabulate(self.methods, headers=METHOD_COLUMNS, disable_numparse=True))
        return "\n\n".join([*parts, "\n".join(self.sentences)]).rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def rows(table: Sequence[Sequence[str]], tag: str = "td") -> str:
            lines = ("".join(f"<{tag} style='text-align:left'>{escape(cell)}</{tag}>" for cell in row) for row in table)
            return "".join(f"<tr>{line}</tr>" for line in lines)

        parts = [f"<table>{rows(self.facts)}</table>"]
        if self.methods:
            parts.append(f"<table>{rows([METHOD_COLUMNS], 'th')}{rows(self.methods)}</table>")
        return "".join([*parts, *(f"<p>{escape(sentence)}</p>" for sentence in self.sentences)])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Return the report that `to_dict` gave; entries that it does not know are left out."""
        known = {one.name for one in fields(cls)}
        tables = {name: tuple(map(tuple, values.get(name, ()))) for name in ("facts", "methods")}
        found = {name: value for name, value in values.items() if name in known}
        return cls(**{**found, **tables, "sentences": tuple(values.get("sentences", ()))})


METHOD_COLUMNS = ("method", "held-out accuracy", "seconds", "note")


def make_report(
    trainer: Any,
    choice: Choice,
    items: Sequence[Datum],
    comparison: Comparison | None,
    temperature: float | None,
    errors: tuple[float, float] | None,
    rule: UnknownRule | None,
    tested: tuple[float, int] | None,
) -> Report:
    """Make the report of a trained classifier.

    Args:
        trainer: the trained method.
        choice: its name and settings.
        items: the images that it learnt from.
        comparison: what cross-validation found; None: there was none.
        temperature: what logits are divided by; None: they are not calibrated.
        errors: calibration error before and after; None: not known.
        rule: for images of no known class; None: not asked for, or there are too few classes.
        tested: accuracy on test images and their number; None: there are none.
    """
    counts = Counter(item.label for item in items)
    names = {item.label: item.classname for item in items}
    fewest, most = min(counts.values()), max(counts.values())
    each = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    facts = [
        ("method", choice.shown),
        ("backbone", trainer.cfg.MODEL.BACKBONE.NAME),
        ("images to learn from", f"{len(items)}, {each} of each of {len(counts)} classes"),
    ]
    sentences: list[str] = []
    accuracy, low, high = (None, 0.0, 100.0) if comparison is None else estimate(comparison)
    if comparison is not None:
        sentences.append(f"{comparison.why}.")
        if accuracy is not None and not math.isnan(accuracy):
            held = int(comparison.held.sum())
            shown = f"{accuracy:.1f} % ({low:.1f} to {high:.1f}), by {held} held-out images"
            facts.append(("expected accuracy", shown))
            sentences += _of_more_images(comparison)
        else:
            accuracy = None
            sentences.append("How accurate it is cannot be said: no image could be held out.")
    if fewest == 1 < most:
        single = [names[label] for label, count in counts.items() if count == 1]
        others = " and others" if len(single) > 5 else ""
        sentences.append(f"{', '.join(single[:5])}{others} had one image, which was never held out.")
    if tested is not None:
        facts.append(("test accuracy", f"{tested[0]:.1f} % of {tested[1]} images"))
    if temperature is not None:
        facts.append(("temperature", f"{temperature:.3g}"))
    if errors is not None:
        facts.append(("calibration error (ECE)", f"{errors[0]:.1f} % before, {errors[1]:.1f} % after the temperature"))
    if rule is not None:
        facts += [
            ("unknown below", f"a probability of {rule.threshold:.3f}"),
            ("known against unknown", f"AUROC {rule.auroc:.1f} %, false positives at 95 % {rule.fpr95:.1f} %"),
        ]
    scores = [] if comparison is None or len(comparison.scores) < 2 else comparison.scores
    before, after = errors or (None, None)
    return Report(
        choice.shown, len(counts), len(items), tuple(facts), tuple(sentences), tuple(map(method_row, scores)),
        accuracy, low, high,
        None if tested is None else tested[0], before, after,
        None if rule is None else rule.auroc, None if rule is None else rule.fpr95,
    )  # fmt: skip


def method_row(one: Score) -> tuple[str, str, str, str]:
    """Return the row of a method that was compared, under METHOD_COLUMNS."""
    accuracy = "" if math.isnan(one.accuracy) else f"{one.accuracy:.1f} %"
    return one.choice.shown, accuracy, f"{one.seconds:.1f}", one.skipped


def _of_more_images(comparison: Comparison) -> list[str]:
    """Return a sentence about what more images would bring."""
    if not comparison.learns:
        return ["It learns nothing from images, so that more of them would change nothing."]
    gain = gain_of_doubling(comparison.curve)
    if gain is None:
        return ["What more images would bring cannot be said: there are too few to leave some away."]
    sizes = sorted(comparison.curve)
    shown = ", ".join(f"{comparison.curve[size]:.1f} % with {size:.3g}" for size in sizes)
    bring = f"about {gain:.1f} points" if gain >= 0.5 else "little"
    return [f"Held-out accuracy by images of each class: {shown}. Twice as many images would bring {bring}."]

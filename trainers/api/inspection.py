"""Find what is wrong with the photos: mistakes, doubtful labels, near-duplicates, broken and tiny files.

Legend: N photos, C classes, E width of the joint embedding.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dassl.utils import InputError, read_image
from dassl.utils.files import file_digest

from ..app.prediction import infer, main_head, read_batches
from ..clip import zeroshot_weights
from ..features.suspicious import LabelScores, label_scores

TRAINING, TEST = "training", "test"
SIDE = 32  # pixels: photos are compared as gray squares of this side
ALIKE = 0.985  # correlation of two such squares from which on they count as the same picture
DOUBTED = 0.5  # suspicion from which on a label is called doubtful; see features/suspicious.py
_ROWS = 1024  # photos whose similarities to all others are in memory at a time


class Photo(NamedTuple):
    """Hold a photo and what is known of it.

    Attributes:
        path: of the file.
        label: the number of its class.
        part: TRAINING or TEST.
    """

    path: str
    label: int
    part: str


class Doubt(NamedTuple):
    """Hold a photo whose label is doubtful, or which is classified wrongly.

    Attributes:
        photo: the photo.
        other: the number of the class that it seems to be.
        score: how sure that is, 0 to 1.
    """

    photo: Photo
    other: int
    score: float


class Twins(NamedTuple):
    """Hold two photos that show the same picture.

    Attributes:
        first, second: the photos.
        likeness: correlation of their pixels; 1 for equal files.
    """

    first: Photo
    second: Photo
    likeness: float

    @property
    def leaks(self) -> bool:
        """Say whether one was learnt from and the other is tested on."""
        return self.first.part != self.second.part

    @property
    def disagrees(self) -> bool:
        """Say whether the two have different labels."""
        return self.first.label != self.second.label


@dataclass
class Findings:
    """Hold what is wrong with photos.

    Attributes:
        names: of the classes.
        counts: part -> number of photos of each class.
        mistakes: photos that the classifier gets wrong, the surest first.
        judged: how many photos the classifier was asked about: none of these was learnt from.
        doubts: training photos (or all, where none are for training) with a doubtful label, the most doubtful first.
        twins: pairs of near-duplicates, leaks first.
        broken: path -> why it cannot be read.
        tiny: path -> (width, height) of photos with a side less than half of what the model sees.
        confused: (true class, class answered) -> number of photos.
    """

    names: Sequence[str]
    counts: dict[str, list[int]]
    mistakes: list[Doubt] = field(default_factory=list)
    judged: int = 0
    doubts: list[Doubt] = field(default_factory=list)
    twins: list[Twins] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    tiny: dict[str, tuple[int, int]] = field(default_factory=dict)
    confused: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def leaks(self) -> list[Twins]:
        """The near-duplicates of which one is for training and one for testing."""
        return [pair for pair in self.twins if pair.leaks]


@torch.no_grad()
def inspect_photos(
    trainer: Any, photos: Sequence[Photo], held_out: dict[str, Tensor] | None = None, temperature: float = 1.0
) -> Findings:
    """Look at photos with a trained classifier.

    Args:
        trainer: the trained method; labels are positions in its class list.
        photos: the photos. Those for testing are classified.
        held_out: path -> logits [C] of training photos from a run that they were held out of; they count as classified.
        temperature: what logits are divided by.

    Raises:
        InputError: there are no photos, or none can be read.
    """
    if not photos:
        raise InputError("Expected photos to inspect but got none")
    clip, names = trainer.network.clip, list(trainer.dm.dataset.classnames)
    found = Findings(names, {part: _counts(photos, part, len(names)) for part in (TRAINING, TEST)})
    features, logits, kept = [], [], []
    for good, bad in read_batches(trainer, [photo.path for photo in photos], bar=False):
        found.broken.update({photos[number].path: reason for number, reason in bad.items()})
        if not good:
            continue
        numbers = [number for number, _ in good]
        images = torch.stack([image for _, image in good]).to(trainer.device)
        with trainer.precision.autocast():
            features.append(F.normalize(clip.encode_image(images).float(), dim=-1).cpu())
        heads = infer(trainer, images, [photos[number].path for number in numbers])
        logits.append(heads[main_head(trainer, heads)].float().cpu())
        kept += numbers
    if not kept:
        raise InputError(f"Expected photos that can be read but could read none of {len(photos)}")
    readable = [photos[number] for number in kept]
    _judge(found, readable, torch.cat(logits), held_out or {}, temperature)
    _doubt(found, trainer, readable, torch.cat(features))
    squares, sizes = _squares(readable)
    least = min(trainer.cfg.INPUT.SIZE) / 2
    found.tiny = {photo.path: size for photo, size in zip(readable, sizes, strict=True) if min(size) < least}
    found.twins = find_twins(readable, squares)
    return found


def _counts(photos: Sequence[Photo], part: str, classes: int) -> list[int]:
    counts = Counter(photo.label for photo in photos if photo.part == part)
    return [counts.get(label, 0) for label in range(classes)]


def _judge(
    found: Findings, photos: Sequence[Photo], logits: Tensor, held_out: dict[str, Tensor], temperature: float
) -> None:
    for photo, row in zip(photos, logits, strict=True):
        if photo.part == TRAINING:
            if photo.path not in held_out:
                continue
            row = held_out[photo.path]
        found.judged += 1
        probabilities = (row.double() / temperature).softmax(dim=0)
        answer = int(probabilities.argmax())
        if answer != photo.label:
            found.mistakes.append(Doubt(photo, answer, float(probabilities[answer])))
            found.confused[photo.label, answer] += 1
    found.mistakes.sort(key=lambda one: -one.score)


def _doubt(found: Findings, trainer: Any, photos: Sequence[Photo], features: Tensor) -> None:
    """Score the labels of the training photos, each by zero-shot CLIP and by its nearest neighbors among the others."""
    rows = [row for row, photo in enumerate(photos) if photo.part == TRAINING] or list(range(len(photos)))
    labels = torch.tensor([photos[row].label for row in rows])
    zeroshot = zeroshot_weights(trainer.network.clip, found.names, trainer.templates()).float().cpu()
    scores: LabelScores = label_scores(features[rows], labels, zeroshot, trainer.network.clip.logit_scale)
    for place in scores.order().tolist():
        other = int(scores.neighbors[place])
        suspicion = float(scores.suspicion[place])
        if suspicion < DOUBTED:
            break
        if other != labels[place]:
            found.doubts.append(Doubt(photos[rows[place]], other, suspicion))


def _squares(photos: Sequence[Photo]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the photos as standardized gray squares [N, SIDE * SIDE], and their sizes (width, height)."""
    squares, sizes = [], []
    for photo in photos:
        image = read_image(photo.path)
        sizes.append(image.size)
        gray = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX if min(image.size) > SIDE else None)
        squares.append(np.asarray(gray, dtype=np.float32).reshape(-1))
    values = torch.from_numpy(np.stack(squares))
    return F.normalize(values - values.mean(dim=1, keepdim=True), dim=1), sizes


def find_twins(photos: Sequence[Photo], squares: Tensor) -> list[Twins]:
    """Return pairs of photos that show the same picture: equal files, and copies that were resized or saved anew.

    Crops and mirrored copies are not found. A photo is named with each of its copies.

    Args:
        photos: N photos.
        squares: [N, D], of length 1 and mean 0; rows of zeros (photos of one shade) are like none.

    Returns:
        Pairs between training and test first, then those with different labels, each by likeness.
    """
    pairs: dict[tuple[int, int], float] = {}
    for rows in torch.arange(len(squares)).split(_ROWS):
        alike = squares[rows] @ squares.t()
        for row, column in (alike >= ALIKE).nonzero().tolist():
            first = int(rows[row])
            if first < column:
                pairs[first, column] = min(1.0, float(alike[row, column]))
    same: defaultdict[str, list[int]] = defaultdict(list)
    for number, photo in enumerate(photos):
        same[file_digest(Path(photo.path))].append(number)
    for numbers in same.values():
        pairs |= {(first, second): 1.0 for i, first in enumerate(numbers) for second in numbers[i + 1 :]}
    found = []
    for (first, second), likeness in pairs.items():
        one, other = photos[first], photos[second]
        swapped = (one.part, other.part) == (TEST, TRAINING)
        found.append(Twins(other, one, likeness) if swapped else Twins(one, other, likeness))
    return sorted(found, key=lambda pair: (not pair.leaks, not pair.disagrees, -pair.likeness))

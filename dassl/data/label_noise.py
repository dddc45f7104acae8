"""Make training labels wrong on purpose, to learn how much a method minds.

Two kinds of noise: an image gets the label of another class (DATASET.LABEL_NOISE), or its place is taken by an image
of another dataset, which belongs to no class (DATASET.FOREIGN). Any dataset can have it: it is made in the
training images that a run uses, after the few-shot picks, after the classes were chosen and after bad images were left
out. Validation and test images keep their labels.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dassl.config import CfgNode
from dassl.utils import InputError

from .bad_images import find_bad_images
from .datasets import DATASET_REGISTRY, DatasetBase, Datum, build_dataset

__all__ = ["FOREIGN", "Noise", "NoiseMade", "add_noise", "make_noise", "read_noise"]

logger = logging.getLogger(__name__)

FOREIGN = -1  # the true label of an image of another dataset


@dataclass(frozen=True)
class Noise:
    """Hold the shares of wrong images that a configuration asks for.

    Attributes:
        flipped: share of the training images that get another label.
        foreign: share of the training images that are replaced by foreign ones.
        source: name of the dataset that foreign images come from; "": there are none.
    """

    flipped: float = 0.0
    foreign: float = 0.0
    source: str = ""

    def __bool__(self) -> bool:
        return self.flipped > 0 or self.foreign > 0


@dataclass(frozen=True)
class NoiseMade:
    """Hold which of a run's training images were made wrong.

    Attributes:
        asked: what was asked for.
        seed: the seed of all draws.
        true_labels: [N], of the training images in order, before anything cleans them; FOREIGN: of no class.
        rows: of each changed image its path, the name of the class given, and that of the true one, or "foreign".
    """

    asked: Noise
    seed: int
    true_labels: Sequence[int]
    rows: Sequence[tuple[str, str, str]]

    @property
    def foreign(self) -> int:
        """Number of foreign images."""
        return sum(label == FOREIGN for label in self.true_labels)

    @property
    def flipped(self) -> int:
        """Number of images with the label of another class."""
        return len(self.rows) - self.foreign

    def notes(self) -> dict[str, Any]:
        """Return the entry `label_noise` of metrics.json."""
        return {
            "share": self.asked.flipped,
            "flipped": self.flipped,
            "foreign_share": self.asked.foreign,
            "foreign_from": self.asked.source,
            "foreign": self.foreign,
            "images": len(self.true_labels),
            "seed": self.seed,
        }

    def table(self) -> list[tuple[str, str, str]]:
        """Return the rows of label_noise.csv, the head first."""
        return [("image", "label given", "true label"), *self.rows]


def read_noise(cfg: CfgNode) -> Noise:
    """Check DATASET.LABEL_NOISE, FOREIGN and FOREIGN_FROM, and return them.

    Raises:
        InputError: a share is no number from 0 to below 1, both together are 1 or more, or foreign images have no
            dataset to come from, or the wrong one.
    """
    node = cfg.DATASET
    flipped, foreign = (_share(node, key) for key in ("LABEL_NOISE", "FOREIGN"))
    if _exact(flipped) + _exact(foreign) >= 1:
        raise InputError(
            f"Expected DATASET.LABEL_NOISE and DATASET.FOREIGN to be below 1 together but got {flipped} + {foreign}"
        )
    source: Any = node.get("FOREIGN_FROM", "")
    if not foreign:
        if source:
            raise InputError(f"Expected DATASET.FOREIGN above 0 with DATASET.FOREIGN_FROM {source} but got 0")
        return Noise(flipped)
    known = [name for name in DATASET_REGISTRY.registered_names() if name != node.NAME]
    if source not in known:
        raise InputError(
            f"Expected DATASET.FOREIGN_FROM to be another dataset than {node.NAME}, one of {', '.join(known)}, "
            f"but got {source!r}"
        )
    return Noise(flipped, foreign, source)


def _share(node: CfgNode, key: str) -> float:
    value: Any = node.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f"Expected DATASET.{key} to be a share, at least 0 and below 1, but got {value!r}")
    return float(value)


def _exact(share: float) -> Fraction:
    """Return the share as it was written: 0.29 * 100 is 28.999... in floating point."""
    return Fraction(str(share))


def spread(share: float, sizes: Mapping[int, int], room: Mapping[int, int], rng: random.Random) -> dict[int, int]:
    """Compute how many images each class gives, by label, for a share of all images.

    Of N images these are share * N, rounded, halves up. Each class gives share * n of its n images, rounded down; those
    that are missing then come one from each class, first from those that lost most by rounding down. Classes that lost
    alike come in random order.

    Args:
        share: from 0 to below 1.
        sizes: the classes' numbers of images n.
        room: how many images each class has to give; together enough.
        rng: orders classes that lost alike.
    """
    exact = _exact(share)
    given = {label: math.floor(exact * size) for label, size in sizes.items()}
    missing = math.floor(exact * sum(sizes.values()) + Fraction(1, 2)) - sum(given.values())
    order = rng.sample(list(sizes), len(sizes))
    order.sort(key=lambda label: given[label] - exact * sizes[label])
    while missing > 0:
        for label in order:
            if missing > 0 and given[label] < room[label]:
                given[label] += 1
                missing -= 1
    return given


def make_noise(
    items: Sequence[Datum], asked: Noise, foreign: Sequence[Datum], rng: random.Random
) -> tuple[list[Datum], list[int]]:
    """Return the items, some of them wrong, in their order, and their true labels, FOREIGN for foreign images.

    Of the N items, N times `flipped` get the label of another class, each other class being equally likely. Of the
    others, N times `foreign` are replaced by foreign images, which take over label and domain. `spread` says how many
    of each class, and how they are rounded.

    Args:
        items: the training items; their labels are the classes among which noise stays.
        asked: the shares.
        foreign: images that may take a place, taken from the front; no image takes two.
        rng: makes all draws.

    Raises:
        InputError: there is one class only, there are too few foreign images, or a class is left without any image of
            its own dataset.
    """
    names = {item.label: item.classname for item in sorted(items, key=lambda item: item.label)}
    if asked.flipped > 0 and len(names) < 2:
        raise InputError("Expected two classes or more for DATASET.LABEL_NOISE but got one")
    places: dict[int, list[int]] = {label: [] for label in names}
    for place, item in enumerate(items):
        places[item.label].append(place)
    sizes = {label: len(own) for label, own in places.items()}
    flips = spread(asked.flipped, sizes, sizes, rng)
    invited = spread(asked.foreign, sizes, {label: size - flips[label] for label, size in sizes.items()}, rng)
    if sum(invited.values()) > len(foreign):
        raise InputError(
            f"Expected {asked.source} to have {sum(invited.values())} training images for DATASET.FOREIGN but got "
            f"{len(foreign)}"
        )
    found, true, guests = list(items), [item.label for item in items], iter(foreign)
    for label, own in places.items():
        drawn = rng.sample(own, flips[label] + invited[label])
        others = [other for other in names if other != label]
        for place in drawn[: flips[label]]:
            new = rng.choice(others)
            found[place] = Datum(items[place].impath, new, items[place].domain, names[new])
        for place in drawn[flips[label] :]:
            found[place] = Datum(next(guests).impath, label, items[place].domain, names[label])
            true[place] = FOREIGN
    left = {item.label for item, label in zip(found, true, strict=True) if label != FOREIGN}
    bare = [name for label, name in names.items() if label not in left]
    if bare:
        raise InputError(
            f"Expected DATASET.LABEL_NOISE {asked.flipped:g} and DATASET.FOREIGN {asked.foreign:g} to leave each class "
            f"a training image of its dataset but {', '.join(bare[:5])}{', ...' if len(bare) > 5 else ''} would have "
            "none: use less noise, more images of each class (DATASET.NUM_SHOTS) or another seed"
        )
    return found, true


def add_noise(cfg: CfgNode, dataset: DatasetBase, seed: int) -> NoiseMade | None:
    """Make the noise that a configuration asks for in a dataset's training images; None: it asks for none.

    A dataset to test on only has no training images, and stays as it is.

    Raises:
        InputError: see `read_noise` and `make_noise`; or foreign images are images of the dataset itself.
    """
    asked = read_noise(cfg)
    if not asked or dataset.test_only:
        return None
    # A word in the seed: the few-shot picks are drawn with the bare number, and must not follow the same sequence.
    rng = random.Random(f"label noise {seed}")
    before = dataset.train_x
    foreign = _foreign_images(cfg, dataset, asked, rng) if asked.foreign else []
    found, true = make_noise(before, asked, foreign, rng)
    names = dataset.lab2cname
    rows = [
        (item.impath, item.classname, "foreign" if label == FOREIGN else names[label])
        for item, label in zip(found, true, strict=True)
        if item.label != label
    ]
    dataset.replace_training(found)
    made = NoiseMade(asked, seed, true, rows)
    logger.warning(
        "Made wrong on purpose: of %d training images, %d have another class's label, and %d are of another dataset "
        "(DATASET.LABEL_NOISE, DATASET.FOREIGN; listed in label_noise.csv)",
        len(found), made.flipped, made.foreign,
    )  # fmt: skip
    return made


def _foreign_images(cfg: CfgNode, dataset: DatasetBase, asked: Noise, rng: random.Random) -> list[Datum]:
    """Return training images of DATASET.FOREIGN_FROM in random order, enough of them if it has enough."""
    other = cfg.clone()
    other.defrost()
    other.merge_from_list(["DATASET.NAME", asked.source, "DATASET.NUM_SHOTS", -1])
    if "SUBSAMPLE_CLASSES" in other.DATASET:
        other.DATASET.SUBSAMPLE_CLASSES = "all"
    source = build_dataset(other)
    if source.test_only:
        raise InputError(
            f"Expected DATASET.FOREIGN_FROM to have training images but {asked.source} has test images only"
        )
    own = {item.impath for items in (dataset.train_x, dataset.val, dataset.test) for item in items or ()}
    if any(item.impath in own for item in source.train_x):
        raise InputError(
            f"Expected DATASET.FOREIGN_FROM to have other images than {cfg.DATASET.NAME} but {asked.source} shares some"
        )
    drawn = rng.sample(source.train_x, len(source.train_x))
    if not cfg.DATALOADER.SKIP_BAD_IMAGES:
        return drawn
    good: list[Datum] = []
    wanted = len(dataset.train_x)  # more than will be taken
    while drawn and len(good) < wanted:
        some, drawn = drawn[: wanted - len(good)], drawn[wanted - len(good) :]
        bad = find_bad_images(item.impath for item in some)
        good += [item for item in some if item.impath not in bad]
    return good

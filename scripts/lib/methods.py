"""Read what command lines of comparisons name: methods with their configs, datasets, lists of numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import trainers
from dassl.engine import TRAINER_REGISTRY
from dassl.utils import InputError, did_you_mean
from scripts.lib.ablations import FOR_ALL, VARIANTS, Variant
from trainers.app.configuration import default_cfg
from trainers.configs import CONFIGS


class Method(NamedTuple):
    """A method as a command line names it: `TRAINER[:CONFIG][@VARIANT][/HEAD]`.

    Attributes:
        name: what tables call it.
        trainer: registered name.
        config: its YAML.
        variant: "" or one of the trainer's in ablations.py.
        head: the head whose numbers are shown; "": the run's main head.
    """

    name: str
    trainer: str
    config: Path
    variant: str = ""
    head: str = ""

    @property
    def stem(self) -> str:
        """The level of output folders that names the configuration."""
        return f"{self.config.stem}@{self.variant}" if self.variant else self.config.stem

    @property
    def options(self) -> tuple[str, ...]:
        """KEY VALUE pairs of the variant."""
        return find_variant(self.trainer, self.variant).options if self.variant else ()


class NameParts(NamedTuple):
    """The parts of `TRAINER[:CONFIG][@VARIANT][/HEAD]`; those that are not there are ""."""

    trainer: str
    config: str
    variant: str
    head: str


def name_parts(name: str) -> NameParts:
    """Return the parts of a method's name; nothing is checked."""
    run, _, head = name.strip().partition("/")
    rest, _, variant = run.partition("@")
    trainer, _, config = rest.partition(":")
    return NameParts(trainer, config, variant, head)


def find_variant(trainer: str, name: str) -> Variant:
    """Return the variant of a trainer that has this name.

    Raises:
        InputError: the trainer has none of that name.
    """
    known = {variant.name: variant for variant in (*VARIANTS.get(trainer, ()), *FOR_ALL)}
    if name not in known:
        raise InputError(f"Expected a variant of {trainer}, of which there is {', '.join(known)}, but got {name!r}")
    return known[name]


@functools.cache  # it reads all configs, and is asked once per method
def methods_with(config: str) -> dict[str, Path]:
    """Return trainer -> its config of that name, of all trainers that have one which leaves the dataset open.

    Raises:
        InputError: there is no such config.
    """
    found = {}
    for path in sorted((CONFIGS / "trainers").glob(f"*/{config}.yaml")):
        cfg = default_cfg()
        cfg.merge_from_file(str(path))
        if not cfg.DATASET.NAME:
            found[cfg.TRAINER.NAME] = path.relative_to(CONFIGS.parent) if CONFIGS.parent == Path.cwd() else path
    if not found:
        raise InputError(f"Expected --config to be the name of files in configs/trainers/*/ but got {config!r}")
    return found


def choose_methods(asked: str, config: str, heads: bool = False) -> list[Method]:
    """Return the methods asked for, "A,B:config,C@variant,D/head"; "": all that have such a config.

    Args:
        asked: names, separated by commas.
        config: the config of those that name none.
        heads: whether a method may name a head.

    Raises:
        InputError: a trainer or a variant does not exist, a trainer has no such config, or a head is not wanted.
    """
    if not asked:
        return [Method(name, name, path) for name, path in methods_with(config).items()]
    chosen = []
    for item in asked.split(","):
        name, own, variant, head = name_parts(item)
        if head and not heads:
            raise InputError(f"Expected a method without a head but got {item!r}: --heads all shows every head")
        known = TRAINER_REGISTRY.registered_names()
        if name not in known:
            raise InputError(f"Expected a trainer but got {name!r}{did_you_mean(name, known, trainers.ALIASES)}")
        paths = methods_with(own or config)
        if name not in paths:
            raise InputError(f"Expected a config {own or config}.yaml of {name} in configs/trainers but there is none")
        if variant:
            find_variant(name, variant)
        chosen.append(Method(item.strip(), name, paths[name], variant, head))
    return chosen


def check_datasets(names: Iterable[str]) -> None:
    """Check that each name is that of a file in configs/datasets.

    Raises:
        InputError: one is not.
    """
    known = sorted(path.stem for path in (CONFIGS / "datasets").glob("*.yaml"))
    for name in names:
        if name not in known:
            raise InputError(f"Expected datasets to be names of files in configs/datasets but got {name!r}")


@functools.cache  # a table asks for each of its rows
def registered_name(dataset: str) -> str:
    """Return the name under which the dataset of a file in configs/datasets is registered."""
    cfg = default_cfg()
    cfg.merge_from_file(str(CONFIGS / "datasets" / f"{dataset}.yaml"))
    return str(cfg.DATASET.NAME)


def whole_numbers(text: str) -> list[int]:
    """Convert "1,2,4" to [1, 2, 4]."""
    return [int(part) for part in text.split(",")]

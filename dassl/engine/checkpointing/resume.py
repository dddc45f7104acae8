"""Resume a run that was stopped at any point, as if it had not been stopped.

Checkpoints lie in a folder for each registered model: numbered ones, ``model.pth.tar-<epoch>``, which stay, and
``model-step.pth.tar-<epochs done>-<batches done of the next one>``, of which the newest are kept. The text file
``checkpoint`` names the one that a run goes on with; if that one is damaged, the one before takes its place.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from dassl.config import INDIFFERENT, REPORTS, differing, plain_config
from dassl.engine.state import EpochStats
from dassl.utils import InputError, distributed, load_checkpoint
from dassl.utils.checkpoints import BEST_NAME, POINTER_NAME, checkpoint_entry, is_file_name
from dassl.utils.files import remove_checked

from .generators import generator_states, set_generators

if TYPE_CHECKING:
    from dassl.engine.trainer import SimpleTrainer

logger = logging.getLogger(__name__)

__all__ = [
    "Found",
    "Position",
    "batches_from",
    "check_config",
    "check_data",
    "check_recipe",
    "has_checkpoints",
    "named_newest",
    "newest_good",
    "rotate",
    "step_name",
]


class Position(NamedTuple):
    """A place between two steps of a run."""

    epochs: int  # number of epochs that are done
    batches: int  # number of batches of the next epoch that are done


Found = dict[str, tuple[Path, dict[str, Any]]]  # model name -> its file and what is in it


def step_name(position: Position) -> str:
    """Return the file name of the checkpoint of this place."""
    return f"model-step.pth.tar-{position.epochs}-{position.batches}"


def position_of(name: str) -> Position | None:
    """Return the place that a file name tells; None: it tells none, or is no file name."""
    if not is_file_name(name):
        return None
    if match := re.fullmatch(r"model\.pth\.tar-(\d+)", name):
        return Position(int(match[1]), 0)
    if match := re.fullmatch(r"model-step\.pth\.tar-(\d+)-(\d+)", name):
        return Position(int(match[1]), int(match[2]))
    return None


def rotate(folder: Path, last: str, kept: int) -> None:
    """Remove all step checkpoints of a model's folder but those among its newest ``kept`` checkpoints.

    Args:
        last: name of the file written last. Step checkpoints beyond it are of a run that was not resumed.
    """
    newest = position_of(last)
    places = {path: place for path in folder.iterdir() if (place := position_of(path.name)) is not None}
    before = sorted({place for place in places.values() if newest is None or place <= newest}, reverse=True)
    for path, place in places.items():
        if path.name.startswith("model-step") and place not in before[:kept]:
            remove_checked(path)


# ---- finding the checkpoint to go on with


def has_checkpoints(directory: Path, names: Sequence[str]) -> bool:
    """Return whether there is something to resume: every registered model has checkpoints."""
    return bool(names) and all((directory / name / POINTER_NAME).is_file() for name in names)


def named_newest(folder: Path) -> str:
    """Return the file name in the pointer of a model's folder; "" if the pointer cannot be read."""
    try:
        return (folder / POINTER_NAME).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def newest_good(directory: Path, names: Sequence[str]) -> Found | None:
    """Return the newest good checkpoint of each model, all of the same place; None: there is none.

    They are of the same place even if a run died between writing two of them. Damaged files are named in a warning, and
    those before them are tried.

    Raises:
        InputError: there is no place of which all models have a checkpoint.
    """
    files = {name: _candidates(directory / name) for name in names}
    common = set.intersection(*(set(places) for places in files.values()))
    if not common:
        places = sorted({max(found).epochs for found in files.values() if found})
        if not places:
            return None
        raise InputError(
            f'Expected the checkpoints of {", ".join(names)} in "{directory}" to be of the same epoch '
            f"but got epochs {places}"
        )
    for place in sorted(common, reverse=True):
        try:
            return {name: (files[name][place], _read(files[name][place])) for name in names}
        except (InputError, FileNotFoundError) as error:
            logger.warning("%s. The checkpoint before it is tried", error)
    logger.warning('None of the checkpoints in "%s" is good', directory)
    return None


def _read(path: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(path)
    checkpoint_entry(checkpoint, "epoch", path)
    return checkpoint


def _candidates(folder: Path) -> dict[Position, Path]:
    """Return the files to go on with, by place: none beyond the one that the pointer names."""
    places: dict[Position, Path] = {}
    named = named_newest(folder)
    for path in sorted(folder.iterdir()):
        place = position_of(path.name)
        if place is not None:
            places[place] = path
    last = position_of(named)
    # Other files have no place in their names: the best checkpoint, and those that upstream's users named themselves.
    # The best one is written before the rest of what ends an epoch is done, so it serves only where there is no other.
    for name in dict.fromkeys((named, BEST_NAME)):
        path, other = folder / name, is_file_name(name) and position_of(name) is None
        if not other or not path.is_file() or (name == BEST_NAME != named and places):
            continue
        try:
            place = Position(int(_read(path)["epoch"]), 0)
        except (InputError, ValueError) as error:
            logger.warning("%s", error)
            continue
        if name == named:
            last = place
        if name != BEST_NAME or not places:
            places.setdefault(place, path)
    if last is None:
        logger.warning('Expected "%s" to name a checkpoint but got "%s"', folder / POINTER_NAME, named)
        return places
    if last not in places and named != BEST_NAME:
        logger.warning('Expected "%s" to name a file of its folder but got "%s"', folder / POINTER_NAME, named)
    return {place: path for place, path in places.items() if place <= last}


def check_config(found: Found, cfg: Any) -> None:
    """Compare the settings of a checkpoint with the present ones.

    Raises:
        InputError: settings that change the result differ, and TRAIN.FORCE_RESUME is off.
    """
    path, checkpoint = next(iter(found.values()))
    text = (checkpoint.get("engine") or {}).get("config")
    if text is None:
        logger.warning('"%s" does not tell its settings: they are taken to be the present ones', path)
        return
    there, here = yaml.safe_load(text), plain_config(cfg)
    changes = list(differing(there, here, (*INDIFFERENT, *REPORTS)))
    small = [change for change in differing(there, here, ("OUTPUT_DIR", "RESUME")) if change not in changes]
    for change in small:
        logger.info("Resuming with another %s, which changes no result: %r, it was %r", *_told(change))
    if not changes:
        return
    listed = ", ".join("{}: {!r}, it was {!r}".format(*_told(change)) for change in changes)
    if not cfg.TRAIN.FORCE_RESUME:
        raise InputError(
            f'Expected to go on with the settings of "{path}" but some that change the result differ ({listed}): '
            "choose another OUTPUT_DIR (--output-dir), or force it (TRAIN.FORCE_RESUME True; train.py: --force-resume)"
        )
    logger.warning("Resuming is forced with other settings, so the result is not that of either run: %s", listed)


def check_recipe(found: Found, recipe: int, cfg: Any) -> None:
    """Compare the recipe that a checkpoint was made by with the present one.

    Files of earlier versions do not tell their recipe; they count as made by recipe 1.

    Raises:
        InputError: the recipes differ, and TRAIN.FORCE_RESUME is off.
    """
    path, checkpoint = next(iter(found.values()))
    engine = checkpoint.get("engine") or {}
    there = int(engine.get("recipe", 1))
    if not engine or there == recipe:  # without the engine's entry the file is upstream's
        return
    if not cfg.TRAIN.FORCE_RESUME:
        raise InputError(
            f'Expected "{path}" to be made by recipe {recipe} of {cfg.TRAINER.NAME} but got {there}, of another '
            "version of this project: choose another OUTPUT_DIR (--output-dir), or force it (TRAIN.FORCE_RESUME True)"
        )
    logger.warning("Resuming is forced with recipe %d of a run begun by recipe %d", recipe, there)


def check_data(found: Found, digest: str) -> None:
    """Compare the images that a checkpoint was made with, by their digest, with the present ones.

    Args:
        digest: of the present images; "": not known, and nothing is compared.

    Raises:
        InputError: the images differ. No setting forces the run to go on: order and place in an epoch would mean other
            images.
    """
    path, checkpoint = next(iter(found.values()))
    there = ((checkpoint.get("engine") or {}).get("data") or {}).get("digest", "")
    if there and digest and there != digest:
        raise InputError(
            f'Expected to go on with the images that "{path}" was trained on (digest {there[:12]}) but the dataset '
            f"now has other images, labels or parts (digest {digest[:12]}): choose another OUTPUT_DIR (--output-dir)"
        )


def _told(change: Any) -> tuple[str, Any, Any]:
    return change.key, change.here, change.there


# ---- the state beside models and optimizers


def progress_state(trainer: SimpleTrainer) -> dict[str, Any]:
    """Return where the run is, as plain values; all processes of a job must call it."""
    state: dict[str, Any] = {"generators": distributed.gather_objects(generator_states())}
    if trainer.steps_done:
        state |= {
            "step": trainer.steps_done,
            "num_batches": trainer.num_batches,
            "epoch_generators": trainer.epoch_generators,
            "stats": trainer.stats.state_dict(),
        }
    return state


class Progress:
    """The saved ``progress_state``, until the resumed run has come to that place."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state
        self.step = int(state.get("step", 0))  # batches of the first epoch that are done

    def begin(self) -> None:
        """Restore, before the first epoch, the generators' states at the beginning of that epoch."""
        if self.step:
            set_generators(self._state["epoch_generators"])
        else:
            self._set_own()

    def check_length(self, num_batches: int) -> None:
        """Check that the epoch is as long as it was; if not (resuming was forced), begin it anew."""
        if self.step and num_batches != self._state["num_batches"]:
            logger.warning("The epoch begins anew: it has %d batches now", num_batches)
            self.step = 0

    def go_on(self, stats: EpochStats) -> None:
        """Restore the generators and the epoch's means, after the batches that were done have been skipped."""
        if self.step:
            stats.load_state_dict(self._state["stats"])
            self._set_own()

    def _set_own(self) -> None:
        states = self._state.get("generators")
        if not states:  # an older file, or upstream's
            return
        if len(states) == distributed.world_size():
            set_generators(states[distributed.rank()])
        elif not self.step or distributed.is_main():  # else others keep the states they begin the epoch with
            set_generators(states[0])


def batches_from(loader: Any, first: int, skipped: Callable[[], None], endless: bool = False) -> Iterator[Any]:
    """Yield the batches of a pass from number ``first`` (counted from 0) on.

    Loaders that can leave batches out (by ``skip(count)`` of the loader or its batch sampler, called before a pass) do
    not load the batches before; from other loaders these are loaded and dropped.

    Args:
        skipped: called before the first batch that is given out is loaded.
        endless: go through the loader again and again.
    """
    skip = getattr(loader, "skip", None) or getattr(getattr(loader, "batch_sampler", None), "skip", None)
    if first and skip is not None:
        skip(first)
    stream = _again_and_again(loader) if endless else iter(loader)
    if first and skip is None:
        for _ in itertools.islice(stream, first):
            pass
    skipped()
    yield from stream


def _again_and_again(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader

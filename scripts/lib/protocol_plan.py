"""The runs of each protocol: where they lie, what evaluates what, and which cell of the table each of them fills.

Folders, below --output, are those of CoOp's scripts (<CFG>: the config's name, with @VARIANT where there is one;
<dataset>: the stem of its YAML; of one's own images, the name of their folder or CSV file):

    few-shot                <dataset>/<TRAINER>/<CFG>_<k>shots/seed<s>
    base2new                base2new/{train_base,test_new}/<dataset>/shots_<k>/<TRAINER>/<CFG>/seed<s>
    cross-dataset, ood      training as few-shot; evaluation/<TRAINER>/<CFG>_<k>shots/<dataset>/seed<s>,
                            with <dataset>_from_<source> for <dataset> where the source is not imagenet
    ablation                ablation/<dataset>/<TRAINER>/<CFG>_<k>shots/<variant>/seed<s>
    label-noise             label_noise/<share>/<dataset>/<TRAINER>/<CFG>_<k>shots/seed<s>; a share of 0 as few-shot;
                            with --foreign, foreign_<dataset> for label_noise
    transductive            transductive/<dataset>/<TRAINER>/<CFG>/<tasks>/seed<s>; tasks "all": seed1 for all seeds
    methods that train nothing, in all others: <TRAINER>/<CFG>/<dataset>[_base|_new], one run for all shots and seeds
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dassl.config import plain_config
from dassl.engine import TRAINER_REGISTRY
from dassl.utils import InputError
from scripts.lib.ablations import FULL, VARIANTS, Variant
from scripts.lib.grid import Run, command_line, few_shot_run, place_of
from scripts.lib.methods import Method, choose_methods, methods_with, registered_name
from trainers.base import TransductiveTrainer

# Shifted test sets of a source, whose classes are the source's or some of them.
SHIFTED = {
    "imagenet": ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"),
    "shapes": ("shapes_v2", "shapes_sketch", "shapes_a", "shapes_r"),
}
SOURCE_OF = {target: source for source, targets in SHIFTED.items() for target in targets}
# The other ten of the few-shot benchmarks.
BENCHMARKS = (
    *("caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101"),
    *("fgvc_aircraft", "sun397", "dtd", "eurosat", "ucf101"),
)
TRANSFER = {"imagenet": BENCHMARKS, "shapes": ("digits",)}
# StatA's tasks: images and classes of each.
TASKS = {
    "very low, 64": (64, 1, 4),
    "low, 64": (64, 2, 10),
    "medium, 64": (64, 5, 25),
    "medium, 1000": (1000, 5, 25),
    "high, 1000": (1000, 25, 50),
    "very high, 1000": (1000, 50, 100),
    "all": None,
}
# Its streams: gamma, in sets of STREAM_SIZE.
STREAMS = {"low": 0.1, "medium": 0.01, "high": 0.001, "separate": -1.0}
STREAM_SIZE = 128
STREAM_SHARE = 10  # as many fewer streams than tasks

Column = int | str


class Cell(NamedTuple):
    """Name the place in a table that a run fills.

    Attributes:
        block: the table's title.
        row: the method.
        column: None: a column for each head.
    """

    block: str
    row: str
    column: Column | None
    seed: int
    run: Run


@dataclass(frozen=True)
class Asked:
    """Hold what a command line asks for; few-shot and label-noise take several `shots`, only transductive `tasks`."""

    methods: Sequence[Method]
    datasets: Sequence[str]
    shots: Sequence[int]
    seeds: Sequence[int]
    output: Path
    flags: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    targets: Sequence[str] = ()
    groups: Sequence[str] = ()
    noise: Sequence[float] = ()
    foreign: str = ""
    tasks: int = 1000

    def given(self, method: Method, dataset: str, shots: int, *options: str) -> tuple[str, ...]:
        """Return `Run.given` of a method on a dataset."""
        return command_line(method, dataset, shots, self.flags, (*options, *self.options))

    def place(self, dataset: str) -> str:
        """Return what stands for a dataset in the paths of runs."""
        return place_of(dataset, self.flags)


# What can be asked of a method's configuration before anything is run


def trains(cfg: Any) -> bool:
    """Return whether there is anything to train; if not, shots and seed do not matter."""
    return bool(TRAINER_REGISTRY.get(cfg.TRAINER.NAME).trains(cfg))


def refusal(cfg: Any, other_classes: bool) -> str:
    """Return why the configuration cannot be run; "": it can.

    With `other_classes`, a method that cannot be evaluated on classes that it was not trained on is refused, too.
    """
    trainer = TRAINER_REGISTRY.get(cfg.TRAINER.NAME)
    try:
        trainer.check_settings(cfg)
    except OSError:
        pass  # files that are not here may be where the runs are made; else the runs report them
    except (ValueError, KeyError) as error:
        return str(error)
    own = trainer.each_class_has(cfg)
    if other_classes and own:
        return f"it cannot be evaluated on classes that it was not trained on: each has {own} of its own"
    return ""


def suitable(asked: Asked, other_classes: bool, must: bool) -> tuple[list[Method], list[str]]:
    """Return the methods that can be run, and a sentence on each that cannot.

    Args:
        asked: what the command line asks for.
        other_classes: see `refusal`.
        must: True: a method that cannot be run is an error.

    Raises:
        InputError: a method cannot be run although it must, or none can be run.
    """
    found, left_out = [], []
    for method in asked.methods:
        reason = refusal(_cfg(asked, method), other_classes)
        if reason and must:
            raise InputError(f"Expected methods that can be run here but got {method.name}: {reason}")
        if reason:
            left_out.append(f"{method.name} is left out: {reason}")
        else:
            found.append(method)
    if not found:
        raise InputError("Expected a method that can be run here but got none: " + "; ".join(left_out))
    return found, left_out


@functools.cache
def _configuration(given: tuple[str, ...]) -> Any:
    return Run("", "", 0, 1, Path("output"), given).cfg()


def _cfg(asked: Asked, method: Method, *options: str) -> Any:
    return _configuration(asked.given(method, asked.datasets[0], asked.shots[0], *options))


# The runs


def untrained_run(asked: Asked, method: Method, dataset: str, part: str = "all") -> Run | None:
    """Return the one run of a method that trains nothing; None: the method trains."""
    if trains(_cfg(asked, method)):
        return None
    place = asked.place(dataset)
    folder = asked.output / method.trainer / method.stem / (place if part == "all" else f"{place}_{part}")
    return Run(method.name, dataset, 1, 1, folder, asked.given(method, dataset, 1, *_part(part)))


def _part(part: str) -> tuple[str, ...]:
    return () if part == "all" else ("DATASET.SUBSAMPLE_CLASSES", part)


def _trained(asked: Asked, method: Method, dataset: str, shots: int, seed: int) -> Run:
    return few_shot_run(method, dataset, shots, seed, output=asked.output, flags=asked.flags, options=asked.options)


def few_shot(asked: Asked) -> list[Cell]:
    """Plan training and test on each dataset with each number of shots."""
    return [
        Cell(dataset, method.name, shots, seed, once or _trained(asked, method, dataset, shots, seed))
        for dataset in asked.datasets
        for method in asked.methods
        for once in [untrained_run(asked, method, dataset)]
        for shots in asked.shots
        for seed in asked.seeds
    ]


def base2new(asked: Asked) -> list[Cell]:
    """Plan training on the first half of the classes, and test on these and on the others (CoCoOp)."""
    (shots,) = asked.shots
    cells = []
    for dataset in asked.datasets:
        for method in asked.methods:
            once = {part: untrained_run(asked, method, dataset, part) for part in ("base", "new")}
            for seed in asked.seeds:
                where = Path(asked.place(dataset), f"shots_{shots}", method.trainer, method.stem, f"seed{seed}")
                base, new = (
                    Run(method.name, dataset, shots, seed, asked.output / "base2new" / folder / where, given)
                    for folder, part in (("train_base", "base"), ("test_new", "new"))
                    for given in [asked.given(method, dataset, shots, *_part(part))]
                )
                cells.append(Cell(dataset, method.name, "base", seed, once["base"] or base))
                cells.append(Cell(dataset, method.name, "new", seed, once["new"] or replace(new, after=base)))
    return cells


def transfer(asked: Asked) -> list[Cell]:
    """Plan training on the source (`asked.datasets`, one), and evaluation on it and on each target."""
    (source,), (shots,) = asked.datasets, asked.shots
    cells = []
    for method in asked.methods:
        for seed in asked.seeds:
            trained = _trained(asked, method, source, shots, seed)
            cells.append(Cell(source, method.name, source, seed, untrained_run(asked, method, source) or trained))
            for target in asked.targets:
                place = asked.place(target)
                level = place if source == "imagenet" else f"{place}_from_{asked.place(source)}"
                folder = asked.output / "evaluation" / method.trainer / trained.folder.parent.name / level
                given = asked.given(method, target, shots)
                run = Run(method.name, target, shots, seed, folder / f"seed{seed}", given, trained)
                cells.append(Cell(source, method.name, target, seed, untrained_run(asked, method, target) or run))
    return cells


def ablation(asked: Asked) -> list[Cell]:
    """Plan each variant of the methods on each dataset, as rows, with the heads as columns."""
    (shots,) = asked.shots
    cells = []
    for dataset in asked.datasets:
        for method in asked.methods:
            usual = plain_config(_cfg(asked, method))
            for variant in variants_of(asked, method):
                level = f"{method.stem}_{shots}shots"
                folder = asked.output / "ablation" / asked.place(dataset) / method.trainer / level / variant.name
                same = plain_config(_cfg(asked, method, *variant.options)) == usual
                given = asked.given(method, dataset, shots, *variant.options)
                for seed in asked.seeds:
                    run = Run(method.name, dataset, shots, seed, folder / f"seed{seed}", given)
                    run = _trained(asked, method, dataset, shots, seed) if same else run
                    cells.append(Cell(f"{dataset}, {method.name}", variant.label, None, seed, run))
    return cells


def variants_of(asked: Asked, method: Method) -> list[Variant]:
    """Return the method as it is configured, then its variants in the groups asked for (none: in all groups).

    Raises:
        InputError: the method has no variants, or no group of that name.
    """
    backbone = _cfg(asked, method).MODEL.BACKBONE.NAME
    known = [variant for variant in VARIANTS.get(method.trainer, ()) if variant.suits(backbone)]
    groups = list(dict.fromkeys(variant.group for variant in known))
    for group in asked.groups:
        if group not in groups:
            raise InputError(f"Expected groups of variants of {method.trainer} in {groups} but got {group!r}")
    if not known:
        raise InputError(f"Expected a method with variants in scripts/lib/ablations.py but got {method.trainer}")
    wanted = asked.groups or groups
    return [Variant("", "full", FULL, ()), *(variant for variant in known if variant.group in wanted)]


def label_noise(asked: Asked) -> list[Cell]:
    """Plan training with a growing share of wrong labels, the columns, and tests on images with the right ones.

    With `foreign`, that share is of images of another dataset. Runs with wrong labels also write the list of suspicious
    images, of which further tables tell how good it is.
    """
    cells, folder = [], f"foreign_{asked.foreign}" if asked.foreign else "label_noise"
    source = ("DATASET.FOREIGN_FROM", registered_name(asked.foreign)) if asked.foreign else ()
    key = "DATASET.FOREIGN" if asked.foreign else "DATASET.LABEL_NOISE"
    for dataset in asked.datasets:
        for shots in asked.shots:
            for method in asked.methods:
                once = untrained_run(asked, method, dataset)
                for share in asked.noise:
                    noisy = replace(
                        asked,
                        output=asked.output / folder / f"{share:g}",
                        options=(key, f"{share:g}", *source, "DATASET.SUSPICIOUS", "True", *asked.options),
                    )
                    for seed in asked.seeds:
                        run = once or _trained(noisy if share else asked, method, dataset, shots, seed)
                        block = f"{dataset}, {shots} shot{'s' * (shots != 1)}"
                        cells.append(Cell(block, method.name, f"{share:g}", seed, run))
    return cells


def transductive_methods(config: str) -> list[Method]:
    """Return all transductive methods, each with `<config>_zeroshot` where there is one, else with `config`."""
    try:
        own = methods_with(f"{config}_zeroshot")
    except InputError:  # no method has one
        own = {}
    found = [name for name in methods_with(config) if issubclass(TRAINER_REGISTRY.get(name), TransductiveTrainer)]
    return choose_methods(",".join(f"{name}:{config}_zeroshot" if name in own else name for name in found), config)


def transductive(asked: Asked) -> list[Cell]:
    """Plan sets of test images in which some or all classes are present, without training images (StatA).

    Raises:
        InputError: a method is not transductive.
    """
    cells = []
    for dataset in asked.datasets:
        for method in asked.methods:
            trainer = TRAINER_REGISTRY.get(method.trainer)
            if not issubclass(trainer, TransductiveTrainer):
                raise InputError(
                    f"Expected transductive methods but got {method.name} (zero-shot CLIP is always shown)"
                )
            name = trainer.config_node()
            node = _cfg(asked, method).TRAINER[name]
            # Without training images; and no method is told how many classes a task has.
            fixed = {key: value for key, value in {"SUPPORTS": False, "EXPECTED": 5}.items() if key in node}
            for block, column, drawn in _draws(asked.tasks):
                pairs = {f"TRAINER.{name}.{key}": str(value) for key, value in {**fixed, **drawn}.items()}
                options = [part for pair in pairs.items() for part in pair]
                level = f"{block}_{column}".replace(", ", "_").replace(" ", "_")
                folder = asked.output / "transductive" / asked.place(dataset) / method.trainer / method.stem / level
                given = asked.given(method, dataset, 1, *options)
                for seed in asked.seeds:
                    own = 1 if column == "all" else seed
                    run = Run(method.name, dataset, 1, own, folder / f"seed{own}", given)
                    cells.append(Cell(f"{dataset}, {block}", method.name, column, seed, run))
    return cells


def _draws(tasks: int) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Yield block and column of the table, and the keys that draw its tasks."""
    for column, task in TASKS.items():
        names = ("TASK_SIZE", "TASK_CLASSES", "TASK_CLASSES_MOST")
        yield "tasks", column, {"NUM_TASKS": tasks, **dict(zip(names, task, strict=True))} if task else {"TASK_SIZE": 0}
    for column, gamma in STREAMS.items():
        streams = max(1, tasks // STREAM_SHARE)
        yield "streams", column, {"TASK_SIZE": STREAM_SIZE, "STREAM": gamma, "NUM_TASKS": streams}


PLANS: dict[str, Callable[[Asked], list[Cell]]] = {
    "few-shot": few_shot,
    "base2new": base2new,
    "cross-dataset": transfer,
    "ood": transfer,
    "ablation": ablation,
    "label-noise": label_noise,
    "transductive": transductive,
}


def runs_of(cells: Sequence[Cell]) -> list[Run]:
    """Return all runs, each once, and evaluations behind the run that they evaluate."""
    runs = [run for cell in cells for run in (cell.run.after, cell.run) if run is not None]
    return list(dict.fromkeys(runs))

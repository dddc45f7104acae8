"""A grid of runs of train.py: where each lies, whether it is finished, and how N at a time run on this machine.

A run is finished when its folder has the completion marker; one without is started again with the same command, which
resumes it. A finished run whose settings are not those asked for is an error, never taken for the one that was meant.
An evaluation waits for the run that it evaluates. If that run fails, the evaluation is not started; if that run is
made again, so is the evaluation.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from dassl.config import differing, plain_config
from dassl.data.datasets import build_dataset
from dassl.engine import TRAINER_REGISTRY
from dassl.utils import InputError
from dlr_clip_cli.places import python_path
from dlr_clip_cli.train import parse_args
from scripts.lib.jobs import CONSOLE, NOT_STARTED, Step, claimed, finished, open_console
from scripts.lib.methods import Method
from trainers.app import train
from trainers.app.configuration import default_cfg, setup_cfg
from trainers.app.run_folder import dataset_folder, parent_folder
from trainers.compat import LOADER
from trainers.configs import CONFIGS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One run of train.py.

    Attributes:
        method: what tables call it.
        dataset: stem of a YAML in configs/datasets.
        shots: images per class that it is trained with.
        seed: 0 or more.
        folder: its output folder.
        given: the rest of the command line, KEY VALUE pairs last.
        after: the run whose model this one evaluates; None: it trains (or has nothing to train).
        head: the head whose numbers are shown; "": the main head. Runs that differ in that alone are one run.
    """

    method: str
    dataset: str
    shots: int
    seed: int
    folder: Path
    given: tuple[str, ...] = ()
    after: Run | None = None
    head: str = ""

    def arguments(self) -> list[str]:
        """Return the command line, without "python train.py"."""
        model = [] if self.after is None else ["--eval-only", "--model-dir", str(self.after.folder)]
        return ["--seed", str(self.seed), "--output-dir", str(self.folder), *model, *self.given]

    def step(self) -> Step:
        """Return the run as a step of a job."""
        return Step(str(self.folder), tuple(self.arguments()), None if self.after is None else str(self.after.folder))

    def metrics(self) -> dict[str, Any] | None:
        """Return metrics.json of the finished run; None: the run is not finished.

        Raises:
            InputError: a finished run with other settings is there.
        """
        if not finished(self.folder, None if self.after is None else self.after.folder):
            return None
        cfg = self.cfg()
        self._check_settings(cfg)
        metrics: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        self._check_data(cfg, metrics)
        self._check_recipe(cfg, metrics)
        return metrics

    def cfg(self) -> Any:
        """Return the configuration of the run; raise an error where that is wrong."""
        return setup_cfg(parse_args(self.arguments()))

    def _check_settings(self, cfg: Any) -> None:
        wanted = plain_config(cfg)
        there = yaml.load((self.folder / "config.yaml").read_text(encoding="utf-8"), Loader=LOADER)
        others = [change.key for change in differing(there, wanted)]
        if others:
            raise InputError(
                f'Expected the finished run in "{self.folder}" to have the settings asked for but it has other values '
                f"of {', '.join(others)}: move it away, or choose another output folder"
            )

    def _check_recipe(self, cfg: Any, metrics: dict[str, Any]) -> None:
        there, here = int(metrics.get("recipe", 1)), int(TRAINER_REGISTRY.get(cfg.TRAINER.NAME).recipe)
        if there != here:
            raise InputError(
                f'Expected the finished run in "{self.folder}" to be of recipe {here} of {cfg.TRAINER.NAME} but it is '
                f"of recipe {there}, whose numbers were others: move it away, or choose another output folder"
            )

    def _check_data(self, cfg: Any, metrics: dict[str, Any]) -> None:
        there = str(metrics.get("data_digest") or "")
        # A run of an earlier version has no digest; images that this project makes itself are the same everywhere.
        here = digest_of_data(cfg.DATASET.NAME, cfg.DATASET.ROOT) if there or cfg.DATASET.ROOT else ""
        if here and here != there:
            told = f"digest {there[:12]}" if there else "it does not tell of which"
            raise InputError(
                f'Expected the finished run in "{self.folder}" to be of the images that are now in '
                f"{cfg.DATASET.ROOT or cfg.DATASET.NAME} (digest {here[:12]}) but it was made of others, or of another "
                f"split ({told}): move it away, or choose another output folder"
            )


@functools.cache  # asked for each run of a grid
def digest_of_data(name: str, root: str) -> str:
    """Return the digest of a dataset as it is now (`data_digest`); "": it has none, or is not here.

    Raises:
        InputError: the dataset cannot be read where `root` says. Without a root it may be elsewhere, which is only
            logged.
    """
    cfg = default_cfg()
    cfg.DATASET.NAME, cfg.DATASET.ROOT = name, root  # the split is that of all shots and classes
    cfg.DATALOADER.SKIP_BAD_IMAGES = True  # what cannot be read is the runs' own business
    try:
        return str(build_dataset(cfg).data_digest)
    except InputError as error:
        if root:
            raise
        logger.warning("The images of finished runs on %s are not here to be compared: %s", name, error)
        return ""


def command_line(
    method: Method, dataset: str, shots: int, flags: Sequence[str] = (), options: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return `Run.given` for a method on configs/datasets/<dataset>.yaml."""
    yaml_file = CONFIGS / "datasets" / f"{dataset}.yaml"
    files = ("--trainer", method.trainer, "--config-file", str(method.config), "--dataset-config-file", str(yaml_file))
    return (*files, *flags, "DATASET.NUM_SHOTS", str(shots), *method.options, *options)


def place_of(dataset: str, flags: Sequence[str]) -> str:
    """Return what stands for a dataset in the paths of runs that get these flags; see `dataset_folder`."""
    root = dict(zip(flags[::2], flags[1::2], strict=True)).get("--root", "")
    return dataset_folder(dataset, root)


def few_shot_run(
    method: Method,
    dataset: str,
    shots: int,
    seed: int,
    *,
    output: Path,
    flags: Sequence[str] = (),
    options: Sequence[str] = (),
) -> Run:
    """Return the run that trains and tests on one dataset, in the folder below `output` that train.py would choose."""
    place = place_of(dataset, flags)
    folder = parent_folder(output, place, method.trainer, method.stem, shots) / f"seed{seed}"
    given = command_line(method, dataset, shots, flags, options)
    return Run(method.name, dataset, shots, seed, folder, given, head=method.head)


def missing_runs(runs: Iterable[Run]) -> list[Run]:
    """Return the runs that are not finished, each folder once.

    Raises:
        InputError: a finished run with other settings is there.
    """
    return [run for run in {run.folder: run for run in runs}.values() if run.metrics() is None]


class Progress:
    """Show one bar over all runs, with the time left and a run that is going; failures are said above it.

    Attributes:
        failed: the runs that failed, and those that were not started because of that.
    """

    def __init__(self, total: int) -> None:
        self.failed: list[Run] = []
        self._going: list[Run] = []
        self._bar = tqdm(total=total, desc="runs", unit="run", disable=not total)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def on_start(self, run: Run) -> None:
        """Name a run that begins."""
        self._going.append(run)
        self._show()

    def on_end(self, run: Run, code: int | None) -> None:
        """Count a run that ended with that exit code, or (None) was not started."""
        if run in self._going:
            self._going.remove(run)
        self._bar.update()
        self._show()
        if code != 0:
            self.failed.append(run)
            why = "what it evaluates has failed" if code is NOT_STARTED else last_line(run)
            what = "not started" if code is NOT_STARTED else f"failed ({code})"
            self._bar.write(f"{what}: {run.folder}: {why}", file=sys.stderr)

    def _show(self) -> None:
        names = [f"{run.method} {run.dataset} {run.shots} shots seed {run.seed}" for run in self._going[:1]]
        others = len(self._going) - 1
        self._bar.set_postfix_str("".join(names) + (f" and {others} more" if others > 0 else ""))


def run_missing(runs: Sequence[Run], jobs: int, threads: int) -> list[Run]:
    """Run what is not finished, under one progress bar; return the runs that failed or were not started.

    Raises:
        InputError: a finished run with other settings is there; raised before anything is run.
    """
    missing = missing_runs(runs)
    with Progress(len(missing)) as progress:
        run_all(missing, jobs, threads, progress.on_end, progress.on_start)
    return progress.failed


def next_ready(waiting: Sequence[Run], going: Iterable[Run]) -> Run | None:
    """Return the first waiting run that evaluates none of the unfinished runs; None: there is none."""
    unfinished = {*waiting, *going}
    return next((run for run in waiting if run.after not in unfinished), None)


def run_all(
    runs: Sequence[Run],
    jobs: int,
    threads: int = 0,
    on_end: Callable[[Run, int | None], None] | None = None,
    on_start: Callable[[Run], None] | None = None,
) -> None:
    """Run all of `runs`, `jobs` at a time, each in a process of its own.

    What a run prints goes to a file in its folder. If the run that an evaluation evaluates is among `runs`, the
    evaluation begins when that run is finished. The processes are forked off one that has imported everything, which
    saves each of them some seconds. With several GPUs, slot i sees GPU i modulo their number. Stopping this process
    stops the runs; the next call resumes them.

    Args:
        threads: CPU threads of each run; 0: what OMP_NUM_THREADS says, else the cores are shared out evenly.
        on_end: called with each run and its exit code; None: the run is not started, because what it evaluates failed.
        on_start: called with each run that begins.

    Raises:
        InputError: OMP_NUM_THREADS is not a number from 1; raised before anything is run.
    """
    threads = threads or threads_of_environment() or max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([train.__name__])
    waiting: list[Run] = list(runs)
    going: dict[Any, tuple[int, Any, Run]] = {}  # sentinel -> slot, process, run

    def end(run: Run, code: int | None) -> None:
        if on_end is not None:
            on_end(run, code)
        for other in [other for other in waiting if code != 0 and other.after == run]:
            waiting.remove(other)
            end(other, NOT_STARTED)

    with environment(PYTHONPATH=python_path()):
        try:
            while waiting or going:
                while len(going) < jobs and (run := next_ready(waiting, [run for _, _, run in going.values()])):
                    waiting.remove(run)
                    if on_start is not None:
                        on_start(run)
                    slot = min(set(range(jobs)) - {slot for slot, _, _ in going.values()})
                    process = context.Process(target=_work, args=(run.step(), threads, slot))
                    process.start()
                    going[process.sentinel] = slot, process, run
                for sentinel in wait(list(going)):
                    _, process, run = going.pop(sentinel)
                    process.join()
                    end(run, process.exitcode)
        finally:
            for _, process, _ in going.values():
                process.terminate()
            for _, process, _ in going.values():
                process.join()


def threads_of_environment() -> int:
    """Return the threads that OMP_NUM_THREADS asks for; 0: it is not set.

    Raises:
        InputError: it is not a number from 1.
    """
    value = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list sets nested levels; the first is ours
    if not value:
        return 0
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f'Expected OMP_NUM_THREADS to be a number from 1 but got "{value}"')
    return int(value)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set these environment variables within this context; the earlier values come back after it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(step: Step, threads: int, slot: int) -> None:
    import torch  # here in the new process, where it is loaded already

    folder = Path(step.folder)
    with claimed(folder):
        if step.finished():  # by a process that an earlier, killed call has left
            return
        with open_console(folder, step.arguments) as stream:
            for number in (1, 2):
                os.dup2(stream.fileno(), number)
        torch.set_num_threads(threads)
        if torch.cuda.is_available():
            torch.cuda.set_device(slot % torch.cuda.device_count())
        sys.exit(train.main(step.arguments))


def last_line(run: Run) -> str:
    """Return the last line that a run printed; of a run that failed, it says why."""
    try:
        lines = (run.folder / CONSOLE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it left no output"
    return next((line for line in reversed(lines) if line.strip()), "it left no output")

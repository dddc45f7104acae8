"""A grid of runs of train.py: where each lies, whether it is finished, and N of them at a time on this machine.

A run is finished when its folder has the completion marker; one without is started again with the same command, which
resumes it. A finished run whose settings are not those asked for is an error, never taken for the one that was meant.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

import train
from dassl.utils import InputError

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
CONSOLE = "console.txt"  # what a run printed, in its folder
# Settings that say where and how fast, not what: runs that differ in these only are the same run.
INDIFFERENT = ("OUTPUT_DIR", "RESUME", "VERBOSE", "DATASET.ROOT", "DATALOADER.NUM_WORKERS", "TRAIN.PRINT_FREQ")


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
    """

    method: str
    dataset: str
    shots: int
    seed: int
    folder: Path
    given: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """The command line, without "python train.py"."""
        return ["--seed", str(self.seed), "--output-dir", str(self.folder), *self.given]

    def metrics(self) -> dict[str, Any] | None:
        """metrics.json of the finished run; None: it is not finished.

        Raises:
            InputError: a finished run with other settings is there.
        """
        if not (self.folder / "DONE").exists():
            return None
        self._check_settings()
        return json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))

    def _check_settings(self) -> None:
        wanted = yaml.safe_load(train.setup_cfg(train.parse_args(self.arguments())).dump())
        there = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))
        differing = [key for key in _differing(there, wanted) if key not in INDIFFERENT]
        if differing:
            raise InputError(
                f'Expected the finished run in "{self.folder}" to have the settings asked for but it has other values '
                f"of {', '.join(differing)}: move it away, or choose another output folder"
            )


def command_line(
    trainer: str, config: Path, dataset: str, shots: int, flags: Sequence[str] = (), options: Sequence[str] = ()
) -> tuple[str, ...]:
    """What `Run.given` is for a trainer with its YAML on configs/datasets/<dataset>.yaml."""
    yaml_file = ROOT / "configs" / "datasets" / f"{dataset}.yaml"
    files = ("--trainer", trainer, "--config-file", str(config), "--dataset-config-file", str(yaml_file))
    return (*files, *flags, "DATASET.NUM_SHOTS", str(shots), *options)


def few_shot_run(
    method: str,
    trainer: str,
    config: Path,
    dataset: str,
    shots: int,
    seed: int,
    *,
    output: Path,
    flags: Sequence[str] = (),
    options: Sequence[str] = (),
) -> Run:
    """Training and test on one dataset, where train.py itself would put it below `output`."""
    folder = train.parent_folder(output, dataset, trainer, config.stem, shots) / f"seed{seed}"
    return Run(method, dataset, shots, seed, folder, command_line(trainer, config, dataset, shots, flags, options))


def _differing(there: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of the settings that both have, with other values; what an older version did not know is not among them."""
    for key, value in wanted.items():
        if key in there:
            if isinstance(value, dict) and isinstance(there[key], dict):
                yield from _differing(there[key], value, f"{prefix}{key}.")
            elif there[key] != value:
                yield f"{prefix}{key}"


def run_missing(runs: Sequence[Run], jobs: int, threads: int) -> list[Run]:
    """Runs those that are not finished, under one progress bar; returns the ones that failed.

    Raises:
        InputError: a finished run with other settings is there; said before anything is run.
    """
    missing = [run for run in runs if run.metrics() is None]
    failed = []
    with tqdm(total=len(missing), desc="runs", unit="run", disable=not missing) as bar:

        def on_end(run: Run, code: int) -> None:
            bar.update()
            if code:
                failed.append(run)
                bar.write(f"failed ({code}): {run.folder}: {last_line(run)}", file=sys.stderr)

        run_all(missing, jobs, threads, on_end)
    return failed


def run_all(runs: Sequence[Run], jobs: int, threads: int = 0, on_end: Callable[[Run, int], None] | None = None) -> None:
    """Runs them, `jobs` at a time, each in a process of its own; what a run prints goes to a file in its folder.

    The processes are forked off one that has imported everything, which saves each of them some seconds. With several
    GPUs, slot i sees GPU i modulo their number. Stopping this process stops the runs; the next call resumes them.

    Args:
        threads: CPU threads of each; 0: the cores shared out evenly.
        on_end: called with each run and its exit code.
    """
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    waiting, going = list(runs), {}
    with _environment(PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])):
        try:
            while waiting or going:
                while waiting and len(going) < jobs:
                    run = waiting.pop(0)
                    slot = min(set(range(jobs)) - {slot for slot, _, _ in going.values()})
                    process = context.Process(target=_work, args=(run.arguments(), str(run.folder), threads, slot))
                    process.start()
                    going[process.sentinel] = slot, process, run
                for sentinel in wait(list(going)):
                    _, process, run = going.pop(sentinel)  # type: ignore[call-overload]
                    process.join()
                    if on_end is not None:
                        on_end(run, process.exitcode)
        finally:
            for _, process, _ in going.values():
                process.terminate()
            for _, process, _ in going.values():
                process.join()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
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


def _work(arguments: list[str], folder: str, threads: int, slot: int) -> None:
    import torch  # here in the new process, where it is loaded already

    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / CONSOLE, "a", encoding="utf-8") as stream:
        stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} python train.py {' '.join(arguments)}\n")
        stream.flush()
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(slot % torch.cuda.device_count())
    sys.exit(train.main(arguments))


def last_line(run: Run) -> str:
    """The last line that a run printed: of one that failed, why."""
    try:
        lines = (run.folder / CONSOLE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it left no output"
    return next((line for line in reversed(lines) if line.strip()), "it left no output")

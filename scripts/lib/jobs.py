"""Tell finished runs, claim their folders, and run several in sequence as one job of a cluster.

This module does not import torch, so that a job is on its way at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dlr_clip_cli.places import TRAIN, spoken

try:
    import fcntl
except ImportError:  # Windows: folders are then not guarded
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

DONE = "DONE"
CONSOLE = "console.txt"  # what a run printed, in its folder
CLAIM = "claim.lock"
NOT_STARTED = None  # in place of an exit code


def finished(folder: Path, after: Path | None = None) -> bool:
    """Return whether a run is finished: it has its completion marker.

    The marker of an evaluation must also not be older than that of the run that it evaluates, whose folder is `after`.
    """
    if not (folder / DONE).exists():
        return False
    return after is None or ((after / DONE).exists() and _when(after) <= _when(folder))


def _when(folder: Path) -> str:
    return str(json.loads((folder / DONE).read_text(encoding="utf-8")).get("finished", ""))  # ISO, UTC: sorts as text


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[IO[str]]:
    """Make the folder, and claim it when no other process claims it any more; a killed process lets go of its claim."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / CLAIM, "w", encoding="utf-8") as stream:
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError as error:  # a network folder that cannot lock
                logger.warning("Going on without a claim on %s: %s", folder, error)
        yield stream


def open_console(folder: Path, arguments: Sequence[str]) -> IO[str]:
    """Open the run's console file, and write its command line into it."""
    stream = open(folder / CONSOLE, "a", encoding="utf-8")  # noqa: SIM115 (the caller closes it)
    stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {spoken('train')} {shlex.join(arguments)}\n")
    stream.flush()
    return stream


@dataclass(frozen=True)
class Step:
    """One run: its folder, its command line without "python train.py", the folder of the run that it evaluates."""

    folder: str
    arguments: tuple[str, ...]
    after: str | None = None

    def finished(self) -> bool:
        """Return whether the run is finished; see the function `finished`."""
        return finished(Path(self.folder), None if self.after is None else Path(self.after))


class Chain:
    """A run and what evaluates it, in sequence: one job. Called again, it goes on where it was cut short.

    Args:
        steps: each after the one that it evaluates.
        processes: number of processes of each run, on one machine (torchrun); evaluations take one.
        threads: CPU threads of each process; 0: no number is set.
        program: what the interpreter is given in place of train.py, for tests.
    """

    def __init__(
        self, steps: Sequence[Step], processes: int = 1, threads: int = 0, program: Sequence[str] = TRAIN
    ) -> None:
        self.steps, self.processes, self.threads, self.program = list(steps), processes, threads, tuple(program)

    def __call__(self) -> list[int | None]:
        """Run the steps; return their exit codes.

        A code is 0 also where the step was finished before. None: the step was not started, because what it evaluates
        has failed.
        """
        codes: dict[str, int | None] = {}
        for step in self.steps:
            if step.after is not None and codes.get(step.after, 0) != 0:
                codes[step.folder] = NOT_STARTED
                continue
            with claimed(Path(step.folder)) as claim:
                codes[step.folder] = 0 if step.finished() else self._run(step, claim)
        return list(codes.values())

    def _run(self, step: Step, claim: IO[str]) -> int:
        command = [sys.executable, *self.program]
        if self.processes > 1 and step.after is None:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
            command[1:1] = launcher
        with open_console(Path(step.folder), step.arguments) as stream:
            process = subprocess.Popen(
                [*command, *step.arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **({"OMP_NUM_THREADS": str(self.threads)} if self.threads else {})},
                pass_fds=[claim.fileno()],  # if this process is killed, the claim ends with the run
                start_new_session=True,  # the queue's signals are for this process
            )
            try:
                return process.wait()
            finally:  # this job is told to end, or to make room and come back
                if process.poll() is None:
                    process.terminate()
                    process.wait()

    def checkpoint(self) -> Any:
        """Return what submitit is to queue again when the job is preempted or out of time: the same job."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

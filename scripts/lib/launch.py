"""Missing runs as jobs of a cluster, through submitit: SLURM arrays, or processes on this machine.

A job is a run and, in sequence, what evaluates it: evaluations take seconds, so that queueing them by themselves would
cost more than they do, and nothing has to be said about dependencies to the queue. A job that is preempted or out of
time is queued again and resumes its run. This program only submits and watches: jobs outlive it, and when it is started
again it waits for those that are still queued or running and submits the others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dassl.utils import InputError, atomic_write
from dassl.utils.packages import needed_package
from dlr_clip_cli.places import TRAIN, python_path
from scripts.lib.grid import Progress, Run, environment, missing_runs, run_missing
from scripts.lib.jobs import Chain

JOB = "job.json"  # in the folder of a chain's first run: the job that has it
# Parameters that submitit knows whatever the cluster is; others are SLURM's own, `slurm_<name>` there.
COMMON = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "name")


def chains(runs: Sequence[Run]) -> list[list[Run]]:
    """Group the runs that belong in one job, in order: one that trains and those that evaluate it."""
    found: dict[Path, list[Run]] = {}
    for run in runs:
        found.setdefault((run.after or run).folder, []).append(run)
    return [sorted(chain, key=lambda run: run.after is not None) for chain in found.values()]


def parameters_of(pairs: Sequence[str]) -> dict[str, Any]:
    """Convert KEY=VALUE pairs to submitit's parameters; whole numbers become int.

    Raises:
        InputError: one of them is no pair.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"Expected --slurm KEY=VALUE but got {pair!r}")
        name = key if key in COMMON or key.startswith("slurm_") else f"slurm_{key}"
        found[name] = int(value) if value.isdecimal() else value
    return found


def launch(
    missing: Sequence[Run],
    *,
    logs: Path,
    cluster: str = "slurm",
    jobs: int = 0,
    threads: int = 0,
    processes: int = 1,
    parameters: Mapping[str, Any] | None = None,
    poll: float = 10.0,
    program: Sequence[str] = TRAIN,
) -> list[Run]:
    """Have the missing runs run as jobs; return those that failed or were not started.

    Args:
        logs: folder of submitit's files.
        cluster: "slurm", or "local" for processes on this machine.
        jobs: largest number of jobs at a time; 0: no bound on a cluster, one on this machine.
        threads: CPU threads of each run; 0: the cluster's default.
        processes: number of processes of each run (torchrun).
        parameters: further parameters of submitit.
        poll: seconds between two looks at the jobs.
        program: see `Chain`.

    Raises:
        InputError: submitit is not installed, finds no cluster, or does not know a parameter.
    """
    if not missing:
        return []
    submitit = needed_package("submitit", "jobs of a cluster", "cluster")
    waiting = chains(missing)
    going: list[tuple[Any, list[Run]]] = []  # a job with its runs
    if cluster == "slurm":
        for chain in list(waiting):
            job = _earlier_job(chain)
            if job is not None:
                waiting.remove(chain)
                going.append((job, chain))
    given = {"name": "protocol", **({"cpus_per_task": threads} if threads else {}), **(parameters or {})}
    if jobs:
        given["slurm_array_parallelism"] = jobs
    bound = len(waiting) if cluster == "slurm" else jobs or 1
    with environment(PYTHONPATH=python_path()):
        try:
            executor = submitit.AutoExecutor(folder=logs.absolute(), cluster=cluster)
            executor.update_parameters(**given)
        except RuntimeError as error:
            raise InputError(f"Expected a {cluster} cluster but submitit finds none: {error}") from error
        except (NameError, TypeError) as error:
            raise InputError(f"Expected parameters that submitit knows but got {given}: {error}") from error
        with Progress(len(missing)) as progress:
            while waiting or going:
                fresh = waiting[: max(0, bound - len(going))] if cluster != "slurm" else waiting
                if fresh:
                    work = [Chain([run.step() for run in chain], processes, threads, program) for chain in fresh]
                    going += zip(_submit(executor, work, fresh), fresh, strict=True)
                    waiting = waiting[len(fresh) :]
                for job, chain in [pair for pair in going if pair[0].done()]:
                    going.remove((job, chain))
                    for run, code in zip(chain, _codes(job, chain), strict=True):
                        progress.on_end(run, code)
                if going:
                    time.sleep(poll)
    return progress.failed


def _submit(executor: Any, work: Sequence[Chain], chains: Sequence[Sequence[Run]]) -> list[Any]:
    with executor.batch():  # on SLURM one array
        submitted = [executor.submit(chain) for chain in work]
    for job, chain in zip(submitted, chains, strict=True):
        record = (chain[0].after or chain[0]).folder / JOB
        record.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(record) as stream:
            json.dump({"id": job.job_id, "folder": str(executor.folder)}, stream)
    return submitted


def _earlier_job(chain: Sequence[Run]) -> Any:
    """Return the SLURM job that an earlier call has submitted for these runs, if it is queued or running; else None."""
    import submitit

    try:
        record = json.loads(((chain[0].after or chain[0]).folder / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    job: Any = submitit.SlurmJob(folder=record["folder"], job_id=record["id"])
    return None if job.done(force_check=True) else job


def _codes(job: Any, chain: Sequence[Run]) -> list[int | None]:
    """Return the exit codes of the runs of a job that has ended.

    Where the job was lost, runs without the completion marker get 1 and the others 0.
    """
    codes: Sequence[int | None] = ()
    if job.paths.result_pickle.exists():  # else submitit would wait for it
        with contextlib.suppress(Exception):  # whatever the job raised
            codes = job.result()
    if len(codes) != len(chain):  # lost, or submitted by an earlier call for more runs or fewer
        return [0 if run.step().finished() else 1 for run in chain]
    return list(codes)


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say who runs a grid of runs, and how many at a time; `run_them` reads them."""
    parser.add_argument("--jobs", type=int, help="runs at a time (default: 1; on a cluster as many as it lets)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a run (default: see docs/PROTOCOLS.md)")
    parser.add_argument("--launcher", choices=("local", "submitit"), default="local", help="who runs them")
    parser.add_argument("--cluster", default="slurm", help="submitit: slurm, or local to try it (default: slurm)")
    parser.add_argument("--partition", help="submitit: SLURM's partition")
    parser.add_argument("--time", type=int, default=240, help="submitit: minutes of each job (default: 240)")
    parser.add_argument("--gpus-per-run", type=int, default=1, help="submitit: GPUs, a process each (default: 1)")
    parser.add_argument("--slurm", action="append", default=[], metavar="KEY=VALUE", help="submitit: any parameter")


def run_them(runs: Sequence[Run], args: argparse.Namespace) -> list[Run]:
    """Run what is missing, here or on the cluster; return the runs that failed or were not started."""
    if args.launcher == "local":
        return run_missing(runs, args.jobs or 1, args.threads)
    parameters = {"timeout_min": args.time, "gpus_per_node": args.gpus_per_run}
    if args.partition:
        parameters["slurm_partition"] = args.partition
    return launch(
        missing_runs(runs),
        logs=args.output / "jobs",
        cluster=args.cluster,
        jobs=args.jobs or 0,
        threads=args.threads,
        processes=max(1, args.gpus_per_run),
        parameters={**parameters, **parameters_of(args.slurm)},
        poll=10.0 if args.cluster == "slurm" else 0.5,
    )

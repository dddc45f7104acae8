"""Runs as jobs through submitit: its local executor with real processes, and a queue that stands in for SLURM's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import submitit
from submitit.core.utils import cloudpickle_dump

from dassl.utils import InputError
from scripts.lib.grid import Run
from scripts.lib.jobs import Chain, claimed
from scripts.lib.launch import chains, launch, parameters_of
from scripts.protocol import main

STAND_IN = (str(Path(__file__).parents[1] / "helpers" / "stand_in_train.py"),)  # in place of train.py


def train_run(folder: Path) -> Run:
    return Run("m", "digits", 1, 1, folder)


def starts(run: Run) -> int:
    path = run.folder / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def missing(runs: list[Run]) -> list[Run]:
    return [run for run in runs if not run.step().finished()]


def launch_local(runs: list[Run], logs: Path, jobs: int = 3) -> list[Run]:
    return launch(runs, logs=logs, cluster="local", jobs=jobs, poll=0.05, program=STAND_IN)


def test_a_killed_launcher_started_again_finishes_what_is_missing(tmp_path):
    runs = [train_run(tmp_path / f"run{i}") for i in range(12)]
    runs += [replace(train_run(tmp_path / f"eval{i}"), after=runs[i]) for i in range(2)]
    logs = tmp_path / "jobs"
    process = multiprocessing.get_context("fork").Process(target=launch_local, args=(runs, logs))
    process.start()
    deadline = time.monotonic() + 120
    while len(runs) - len(missing(runs)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    left = missing(runs)
    assert 0 < len(left) < len(runs)
    assert launch_local(left, logs) == []
    assert missing(runs) == [] and [starts(run) for run in runs] == [1] * 14  # also those that were going when it died
    assert len(list(logs.glob("*_submitted.pkl"))) < 2 * 12


def test_a_preempted_job_is_queued_again_and_runs_the_same_command(tmp_path):
    run = train_run(tmp_path / "run")
    run.folder.mkdir()
    (run.folder / "linger").touch()
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        job = executor.submit(Chain([run.step()], program=STAND_IN))
    deadline = time.monotonic() + 60
    while starts(run) < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    for task in submitit_tasks(job):
        os.kill(task, signal.SIGUSR2)
    assert job.result() == [0]
    assert starts(run) == 2 and len(set((run.folder / "starts").read_text().splitlines())) == 1


def submitit_tasks(job: submitit.LocalJob) -> list[int]:
    """Processes of the job behind the one that minds it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    return [process for process, parent in parents.items() if parent == int(job.job_id)]


def test_what_evaluates_a_failed_run_is_not_started(tmp_path):
    runs = [train_run(tmp_path / name) for name in ("good", "bad")]
    evaluations = [replace(train_run(tmp_path / f"{run.folder.name}_eval"), after=run) for run in runs]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "fail").touch()
    grouped = chains([*runs, *evaluations])
    assert grouped == [[runs[0], evaluations[0]], [runs[1], evaluations[1]]]
    assert [Chain([run.step() for run in chain], program=STAND_IN)() for chain in grouped] == [[0, 0], [3, None]]
    assert Chain([run.step() for run in grouped[0]], program=STAND_IN)() == [0, 0]
    assert [starts(run) for run in (*runs, *evaluations)] == [1, 1, 1, 0]


def test_a_folder_is_one_process_at_a_time(tmp_path):
    def hold() -> None:
        with claimed(tmp_path):
            (tmp_path / "held").touch()
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    waiting = multiprocessing.get_context("fork").Process(target=lambda: claimed(tmp_path).__enter__())
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    process.kill()
    waiting.join(30)
    assert waiting.exitcode == 0


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Programs in place of SLURM's: jobs are counted and never run; their state is what the file "state" says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "srun": "",
        "sbatch": f'echo "$1" >> {tmp_path}/submitted; echo Submitted batch job 77',
        "sacct": f'echo "JobID|State|NodeList"; echo "77_0|$(cat {tmp_path}/state)|n"; echo "77_1|FAILED|n"',
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    submitit.SlurmJob.watcher.clear()
    return tmp_path


def test_slurm_gets_one_array_and_jobs_that_are_still_there_are_waited_for(queue):
    runs = [train_run(queue / "run0"), train_run(queue / "run1")]
    given = {**parameters_of(["partition=gpu", "cpus_per_task=4"]), "timeout_min": 30, "gpus_per_node": 1}

    def start(runs: list[Run]) -> list[Run]:
        return launch(runs, logs=queue / "jobs", jobs=1, parameters=given, poll=0.05, program=STAND_IN)

    (queue / "state").write_text("FAILED")
    assert start(runs) == runs
    (script,) = [Path(line) for line in (queue / "submitted").read_text().splitlines()]
    text = next((queue / "jobs").glob("*submission*.sh")).read_text() if not script.exists() else script.read_text()
    for option in ("--array=0-1%1", "--partition=gpu", "--cpus-per-task=4", "--gpus-per-node=1", "--time=30"):
        assert option in text
    submitit.SlurmJob.watcher.clear()
    (queue / "state").write_text("RUNNING")
    cloudpickle_dump(("success", [0]), queue / "late.pkl")

    def finish() -> None:
        time.sleep(0.5)
        (queue / "late.pkl").rename(queue / "jobs" / "77_0_0_result.pkl")

    process = multiprocessing.get_context("fork").Process(target=finish)
    process.start()
    assert start(runs[:1]) == []  # the job of the first call had not ended
    process.join()
    assert len((queue / "submitted").read_text().splitlines()) == 1


def test_real_runs_through_submitit(tmp_path, capsys):
    arguments = ["few-shot", "--trainers", "ZeroshotCLIP", "--output", str(tmp_path), "--launcher", "submitit"]
    assert main([*arguments, "--cluster", "local", "--gpus-per-run", "0", "--seeds", "1", "--threads", "1"]) == 0
    assert "| ZeroshotCLIP |" in capsys.readouterr().out
    assert (tmp_path / "ZeroshotCLIP" / "tiny" / "digits" / "DONE").exists()


def test_wrong_parameters_are_said_before_anything_is_submitted(tmp_path):
    with pytest.raises(InputError, match="KEY=VALUE"):
        parameters_of(["partition"])
    with pytest.raises(InputError, match="parameters that submitit knows"):
        parameters = parameters_of(["nonsense=1"])
        launch([train_run(tmp_path / "run")], logs=tmp_path / "jobs", cluster="local", parameters=parameters)
    with pytest.raises(InputError, match="Expected a slurm cluster"):
        launch([train_run(tmp_path / "run")], logs=tmp_path / "jobs")
    assert not (tmp_path / "run").exists()

"""Runs in several processes, started by torchrun: the numbers of one process, files of one process, no hang."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import two_processes
from PIL import Image

from dassl.utils import distributed
from scripts.dev.kill_test import read_outcome
from trainers.app import train

ROOT = Path(train.__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TIMEOUT = 600  # seconds, for machines with other things to do
HELPER = str(ROOT / "tests" / "helpers" / "two_processes.py")


MIXTURE = ("TRAINER.DLRCLIP.FUSION", "mixture", "TRAINER.DLRCLIP.HEAD", "mixed", "TRAINER.DLRCLIP.MIXTURE.VIEWS", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_tiny) -> Path:
    """Three classes of pictures: 24 to train on, 6 for validation, 15 to test on."""
    folder = tmp_path_factory.mktemp("torchrun")
    for part, count in (("train", 8), ("val", 2), ("test", 5)):
        for label, name in enumerate(("red", "green", "blue")):
            place = folder / "images" / part / name
            place.mkdir(parents=True)
            for i in range(count):
                color = [40 + 5 * i] * 3
                color[label] = 200 - 9 * i
                picture = Image.new("RGB", (80, 72), tuple(color))
                picture.paste((255, 255, 255), (5 * i, 10, 5 * i + 20, 40))
                picture.save(place / f"{name}{i}.png")
    return folder


@pytest.fixture(scope="module")
def command(folder, random_tiny):
    """Arguments of train.py: 21 steps on batches of 7 with random crops and colors, test batches of 7."""

    def command(trainer: str, config: str, output: str, *pairs: str) -> list[str]:
        return [
            *("--transforms", "random_resized_crop", "random_flip", "colorjitter", "normalize"),
            *("--trainer", trainer, "--config-file", str(ROOT / "configs" / "trainers" / config / "tiny.yaml")),
            *("--seed", "1", "--root", str(folder / "images"), "--output-dir", str(folder / output)),
            *("DATASET.NAME", "ImageFolder", "DATASET.NUM_SHOTS", "-1", "MODEL.BACKBONE.WEIGHTS", str(random_tiny)),
            *("OPTIM.MAX_EPOCH", "7", "DATALOADER.TRAIN_X.BATCH_SIZE", "7", "DATALOADER.TEST.BATCH_SIZE", "7"),
            *("DATALOADER.NUM_WORKERS", "0", "USE_CUDA", "False", "TEST.FINAL_MODEL", "best_val", *pairs),
        ]

    return command


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def one_process() -> dict[str, str]:
    """torchrun's variables for a job of one, without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.fixture(scope="module")
def runs(folder, command):
    """Results of the same commands in one process and in two, and what the two wrote to the console."""
    found = {}
    for name in ("one", "two"):
        argv = [
            command("DLRCLIP", "dlr", f"{name}/dlr", *MIXTURE),
            command("CoOp", "coop", f"{name}/coop"),
            command("CoOp", "coop", f"{name}/views", "INPUT.VIEWS", "2"),
            command("ProGrad", "prograd", f"{name}/prograd", "INPUT.VIEWS", "2"),
            command("TipAdapterF", "tip_adapter_f", f"{name}/tip"),
        ]
        if name == "two":
            argv.append(command("CoOp", "coop", f"{name}/wrong", "TRAINER.COOP.PREC", "fp8"))
        spec = folder / f"{name}.json"
        spec.write_text(json.dumps({"checks": name == "two", "runs": argv}))
        if name == "one":
            with pytest.MonkeyPatch.context() as patch:
                for variable, value in one_process().items():
                    patch.setenv(variable, value)
                patch.setattr(distributed, "_store", None)
                two_processes.main(str(spec))
            done = None
        else:
            done = subprocess.run(
                [*TORCHRUN, HELPER, str(spec)],
                cwd=ROOT,
                env=environment(),
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
            assert done.returncode == 0, done.stderr[-3000:]
        found[name] = json.loads(spec.with_suffix(".losses.json").read_text()), done
    return found


@pytest.mark.parametrize("number, method", enumerate(["dlr", "coop", "views", "prograd", "tip"]))
def test_two_processes_have_the_numbers_of_one(runs, folder, number, method):
    one, two = (runs[name][0][number]["losses"] for name in ("one", "two"))
    assert len(one) >= 20 and two == pytest.approx(one, abs=1e-4)
    metrics = {name: json.loads((folder / name / method / "metrics.json").read_text()) for name in ("one", "two")}
    assert metrics["one"]["test"]["n"] == metrics["two"]["test"]["n"] == 15
    assert metrics["two"]["train"]["loss"] == pytest.approx(metrics["one"]["train"]["loss"], abs=1e-4)
    assert metrics["two"]["selected"].keys() == metrics["one"]["selected"].keys()
    total = re.findall(r"\* total: (\d+)", (folder / "two" / method / "log.txt").read_text())
    assert set(total) == {"6", "15"}


def test_two_processes_mix_the_branches_as_one(runs, folder):
    one, two = (json.loads((folder / name / "dlr" / "metrics.json").read_text()) for name in ("one", "two"))
    weights = [metrics["selected"]["mixture"]["value"] for metrics in (one, two)]
    assert set(weights[0]) == {"clip", "cma", "glr", "proto", "proto_patch", "proto_cma"}
    assert weights[1] == pytest.approx(weights[0], abs=0.02)
    for head in ("proto", "proto_patch", "proto_cma", "mixed"):
        assert two["test"]["heads"][head]["accuracy"] == one["test"]["heads"][head]["accuracy"]


@pytest.mark.parametrize("method", ["dlr", "coop", "tip"])
def test_only_rank_0_writes(runs, folder, method):
    def files(name: str) -> list[str]:
        # Which ends of epochs are kept depends on how long saving takes.
        paths = (path for path in (folder / name / method).rglob("*") if "model-step" not in path.name)
        paths = (path for path in paths if path.is_file())
        return sorted(re.sub(r"(tfevents)\..*", r"\1", str(path.relative_to(folder / name))) for path in paths)

    assert files("two") == files("one")


def test_a_wrong_setting_is_told_once(runs, folder):
    results, done = runs["two"]
    assert [result["code"] for result in results] == [0, 0, 0, 0, 0, 2]
    assert len(re.findall(r"^error: Expected TRAINER.COOP.PREC", done.stderr, re.MULTILINE)) == 1
    assert not (folder / "two" / "wrong").exists()


def test_a_job_that_is_stopped_and_then_killed_goes_on_as_if_it_had_not_been(runs, folder, command):
    out = folder / "killed"
    argv = [*TORCHRUN, str(ROOT / "train.py"), *command("CoOp", "coop", "killed", "TRAIN.CHECKPOINT_STEPS", "1")]

    def signalled(places: str, send) -> list[str]:
        """Starts the job, calls `send` with it at the first of these checkpoints -> what it then said of its end."""
        log = folder / f"{send.__name__}.txt"
        with open(log, "w") as stream:
            job = subprocess.Popen(argv, cwd=folder, env=environment(), stdout=stream, stderr=stream)
        try:
            end = time.monotonic() + TIMEOUT
            while not list(out.glob(places)) and job.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            send(job)
            assert job.wait(timeout=TIMEOUT) != 0  # torchrun's own: 1, or it aborts while it ends
        finally:
            job.kill()
        assert not (out / "DONE").exists() and not list(out.glob("run.lock*"))
        return [line for line in log.read_text().splitlines() if line.startswith(("error:", "stopped"))]

    def terminate(job) -> None:
        job.send_signal(signal.SIGTERM)

    def kill_rank_1(job) -> None:
        os.kill(worker(job.pid, rank=1), signal.SIGKILL)

    (said,) = signalled("prompt_learner/model-step.pth.tar-0-1", terminate)
    assert said.startswith("stopped by SIGTERM, and what was done is kept; it goes on with: the same torchrun command")
    first = (out / "prompt_learner" / "checkpoint").read_text()
    epochs, batches = map(int, re.fullmatch(r"model-step\.pth\.tar-(\d)-([1-3])\s*", first).groups())
    assert (out / "prompt_learner" / first.strip()).exists() and epochs < 5

    (said,) = signalled(f"prompt_learner/model-step.pth.tar-{epochs + 1}-[12]", kill_rank_1)
    assert said.startswith("error: rank 0: rank 1 of this job ended or hung")
    assert "the same command goes on" in said

    done = subprocess.run(argv, cwd=folder, env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "will resume" in done.stdout
    assert read_outcome(folder / "two" / "coop").differences(read_outcome(out)) == []


def worker(parent: int, rank: int) -> int:
    """The process that torchrun has started with that rank."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            variables = (place / "environ").read_bytes().split(b"\0")
            ppid = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if ppid == parent and f"RANK={rank}".encode() in variables:
            return int(place.name)
    raise AssertionError(f"torchrun has no process of rank {rank}")

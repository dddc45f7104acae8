"""Signals to real runs, at different points: the line that is said, and what the same command does then."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from dassl.utils import stopping
from scripts.dev.kill_test import Runs, command, paint, read_outcome
from scripts.lib.jobs import CONSOLE

TIMEOUT = 300.0  # seconds, for machines with other things to do


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, random_tiny) -> list[str]:
    root = tmp_path_factory.mktemp("pictures")
    paint(root / "images")
    # Sixteen epochs: a busy machine may look seconds late for the moment to stop a run.
    weights = ("MODEL.BACKBONE.WEIGHTS", str(random_tiny), "OPTIM.MAX_EPOCH", "16", "TEST.FINAL_MODEL", "last_step")
    return command("CoOp", root / "images", *weights)


@pytest.fixture(scope="module")
def whole(runs, arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    runs.finish(arguments, folder)
    return read_outcome(folder)


def wait_for(condition, process) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


def console(folder: Path) -> str:
    try:
        return (folder / CONSOLE).read_text()
    except FileNotFoundError:
        return ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_training_is_stopped_with_a_checkpoint_and_goes_on(runs, arguments, whole, tmp_path, number, code):
    process = runs.start(arguments, tmp_path)
    wait_for(lambda: list(tmp_path.glob("prompt_learner/model-step.pth.tar-0-2")), process)
    os.kill(process.pid, number)
    process.join(TIMEOUT)
    assert process.exitcode == code
    said = [line for line in console(tmp_path).splitlines() if "stopped by" in line]
    assert len(said) == 1
    assert said[0].startswith(f"stopped by {number.name}, and what was done is kept; it goes on with: python train.py")
    assert "python train.py" in said[0] and "--trainer CoOp" in said[0] and str(tmp_path) in said[0]
    assert "Traceback" not in console(tmp_path)
    assert not (tmp_path / "run.lock").exists() and not (tmp_path / "DONE").exists()
    (pointer,) = tmp_path.glob("*/checkpoint")
    assert pointer.read_text().startswith("model-step.pth.tar-")
    runs.finish(arguments, tmp_path)
    assert whole.differences(read_outcome(tmp_path)) == []


def test_stopped_before_training(runs, arguments, tmp_path):
    process = runs.start(arguments, tmp_path)
    wait_for(lambda: (tmp_path / "log.txt").exists(), process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(TIMEOUT)
    assert process.exitcode == 143
    text = console(tmp_path)
    assert "Traceback" not in text and text.count("stopped by SIGTERM") == 1
    assert not (tmp_path / "run.lock").exists()


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch):
    with stopping.watching(), pytest.raises(stopping.StoppedError) as stopped, stopping.postponed():
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert stopping.noted() == signal.SIGTERM
        monkeypatch.setattr(stopping, "AT_ONCE", 0.0)
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the second one does not wait")
    assert stopped.value.exit_code == 143
    assert stopping.noted() == 0, "what runs next in this process was not told to stop"


def test_second_run_in_the_folder_is_refused_and_names_the_first(runs, arguments, tmp_path):
    first = runs.start(arguments, tmp_path / "run")
    wait_for(lambda: (tmp_path / "run" / "log.txt").exists(), first)  # the lock says who has it by then
    os.kill(first.pid, signal.SIGSTOP)  # alive, and in nobody's way
    try:
        # Each with a console of its own: that of the first one's folder is claimed by it.
        for flags in ([], ["--eval-only"]):
            second = runs.start([*flags, *arguments, "OUTPUT_DIR", str(tmp_path / "run")], tmp_path / "console")
            second.join(TIMEOUT)
            assert second.exitcode == 2
            text = console(tmp_path / "console")
            assert f"to be used by one run at a time but process {first.pid} on {os.uname().nodename}" in text
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.join()

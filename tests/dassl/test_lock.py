from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from dassl.engine.reliability import lock
from dassl.engine.reliability.lock import FolderLock, is_locked
from dassl.utils import InputError

HOLD = (
    "import sys, time; from dassl.engine.reliability.lock import FolderLock; "
    "a = FolderLock(sys.argv[1]); print('held', flush=True)"
)


@pytest.fixture(scope="module")
def holder(tmp_path_factory):
    """A folder, and a process that holds it and is then killed: (folder, process)."""
    folder = tmp_path_factory.mktemp("lock") / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{HOLD}; time.sleep(600)", str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield folder, process
    process.kill()
    process.wait()


def test_second_is_told_who_has_it_and_takes_over_from_the_dead(holder, caplog):
    folder, process = holder
    assert is_locked(folder)
    told = rf'Expected ".*run" to be used by one run at a time but process {process.pid} on {socket.gethostname()} has'
    with pytest.raises(InputError, match=told):
        FolderLock(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not is_locked(folder) and (folder / "run.lock").exists()
    with FolderLock(folder):
        assert any(f"process {process.pid}" in m and "has ended" in m for m in caplog.messages)
        assert json.loads((folder / "run.lock").read_text())["pid"] == os.getpid()
    assert list(folder.iterdir()) == []


def test_forked_process_does_not_keep_it(tmp_path):
    """As a loader's worker, which outlives a killed run by some seconds."""
    held = FolderLock(tmp_path)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, b"runs")
        time.sleep(60)
        os._exit(0)
    os.read(reading, 4)
    try:
        os.close(held._handle)  # as the system does when the process is killed
        held._handle = None
        assert not is_locked(tmp_path)
        FolderLock(tmp_path).release()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        held.release()


def write(folder, **record):
    (folder / "run.lock").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), **record}))


def test_without_locks_of_the_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    write(tmp_path, process_start=lock._process_start(os.getpid()))
    with pytest.raises(InputError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path)
    write(tmp_path, process_start=1)  # another process had this number
    FolderLock(tmp_path).release()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write(tmp_path, pid=gone.pid)
    FolderLock(tmp_path).release()
    assert not (tmp_path / "run.lock").exists()


def test_other_machine_counts_while_it_touches_the_file(tmp_path):
    write(tmp_path, host="elsewhere", pid=1)
    with pytest.raises(InputError, match=r"process 1 on elsewhere .* free 5 minutes after"):
        FolderLock(tmp_path)
    assert is_locked(tmp_path)
    old = time.time() - lock.STALE - 1
    os.utime(tmp_path / "run.lock", (old, old))
    FolderLock(tmp_path).release()


def test_holder_touches_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with FolderLock(tmp_path):
        os.utime(tmp_path / "run.lock", (0, 0))
        end = time.monotonic() + 30
        while (tmp_path / "run.lock").stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert (tmp_path / "run.lock").stat().st_mtime > 0


def test_half_written_file_is_no_holder(tmp_path):
    (tmp_path / "run.lock").write_text('{"host": "elsew')
    FolderLock(tmp_path).release()

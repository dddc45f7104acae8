"""predict.py --stream: parts of a large folder, after a kill as without, with several processes as with one."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainers.app import predict
from trainers.app.train import main as train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory, random_tiny):
    folder = tmp_path_factory.mktemp("stream") / "run"
    argv = ["--trainer", "ZeroshotCLIP", "--config", "tiny", "--output-dir", str(folder)]
    assert train([*argv, "DATASET.NUM_SHOTS", "1", "MODEL.BACKBONE.WEIGHTS", str(random_tiny)]) == 0
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    for number in range(70):
        path = root / f"folder {number % 3}" / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(path)
    (root / "folder 1" / "bad.png").write_bytes(b"no image")
    return root


def command(run, images, output, *more):
    return ["--model-dir", str(run), str(images), "--output", str(output), "--part-size", "16", "--top-k", "2", *more]


def rows(folder):
    """The rows of all CSV parts, in order; equal for equal answers."""
    found = []
    for part in sorted(folder.glob("part-*.csv")):
        with part.open(newline="") as file:
            found += list(csv.DictReader(file))
    return found


@pytest.fixture(scope="module")
def parts(run, images, tmp_path_factory):
    output = tmp_path_factory.mktemp("parts") / "whole"
    assert predict.main(command(run, images, output, "--stream", "csv")) == 0
    return output


def test_answers_are_those_of_predict(run, images, parts, capsys, tmp_path):
    assert [path.name[:11] for path in sorted(parts.iterdir())] == [f"part-{number:06d}" for number in range(5)]
    capsys.readouterr()
    assert predict.main(["--model-dir", str(run), str(images), "--csv", "--top-k", "2", "--output", str(tmp_path)]) == 0
    printed = {row["path"]: row for row in csv.DictReader(capsys.readouterr().out.splitlines())}
    found = rows(parts)
    assert len(found) == 71 and [row["path"] for row in found] == sorted(row["path"] for row in found)
    for row in found:
        if row["error"]:
            assert row["path"].endswith("bad.png") and "bad.png" in row["error"] and not row["class_1"]
            continue
        theirs = printed[row["path"]]
        assert row["class_1"] == theirs["class_1"]
        assert float(row["probability_1"]) == pytest.approx(float(theirs["probability_1"]), rel=1e-4)


def test_what_is_there_is_not_done_again(run, images, parts, tmp_path, capsys):
    output = tmp_path / "again"
    output.mkdir()
    first = sorted(parts.iterdir())
    for path in first[:3]:
        (output / path.name).write_bytes(path.read_bytes())
    assert predict.main(command(run, images, output, "--stream", "csv")) == 0
    assert rows(output) == rows(parts)
    times = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert predict.main(command(run, images, output, "--stream", "csv")) == 0
    assert "0 images" in capsys.readouterr().err
    assert times == {path.name: path.stat().st_mtime_ns for path in output.iterdir()}


def test_other_images_and_other_answers_replace_the_parts(run, images, parts, tmp_path, caplog):
    output, more = tmp_path / "parts", tmp_path / "more"
    more.mkdir()
    for path in sorted((images / "folder 0").iterdir())[:20]:
        (more / path.name).write_bytes(path.read_bytes())
    assert predict.main(command(run, more, output, "--stream", "csv")) == 0
    before = {path.name for path in output.iterdir()}
    (more / "000.png").unlink()  # all others move up by one
    assert predict.main(command(run, more, output, "--stream", "csv")) == 0
    after = {path.name for path in output.iterdir()}
    assert not before & after and len(rows(output)) == 19 and "Removed 2 parts" in caplog.text
    assert predict.main(command(run, more, output, "--stream", "csv", "--unknown", "0.5")) == 0
    assert not after & {path.name for path in output.iterdir()}
    assert {row["unknown"] for row in rows(output)} <= {"True", "False"}


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_after_a_kill_it_goes_on(run, images, parts, tmp_path):
    output = tmp_path / "killed"
    argv = [sys.executable, str(ROOT / "predict.py"), *command(run, images, output, "--stream", "csv")]
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (output.is_dir() and any(output.glob("part-*"))) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (output / ".part-000004-abc.csv.123.tmp").write_text("half")  # as if it had been killed while writing
    assert predict.main(command(run, images, output, "--stream", "csv")) == 0
    assert rows(output) == rows(parts) and not list(output.glob(".*"))


def test_two_processes_share_the_parts(run, images, parts, tmp_path):
    output = tmp_path / "two"
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    argv += [str(ROOT / "predict.py"), *command(run, images, output, "--stream", "csv", "--cpu")]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert rows(output) == rows(parts)
    assert "39 images" in done.stderr and "32 images" in done.stderr  # parts 0, 2, 4, of which the last is short; 1, 3


def test_parquet(run, images, parts, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert predict.main(command(run, images, tmp_path, "--stream", "parquet")) == 0
    table = parquet.read_table(tmp_path).to_pylist()
    assert [row["path"] for row in table] == [row["path"] for row in rows(parts)]
    assert [row["class_1"] or "" for row in table] == [row["class_1"] for row in rows(parts)]
    assert sum(row["error"] is not None for row in table) == 1


def test_what_is_wrong_is_one_line(run, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for argv, words in (
        (command(run, tmp_path / "empty", tmp_path / "out", "--stream", "csv"), "found none"),
        (command(run, images, tmp_path / "file", "--stream", "csv"), "Expected --output to be a folder"),
        (command(run, images, tmp_path / "out", "--stream", "csv", "--head", "none"), "--head"),
    ):
        assert predict.main(argv) == 2
        err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(err) == 1 and words in err[0]
    with pytest.raises(SystemExit):
        predict.main(["--model-dir", str(run), str(images), "--stream", "csv"])
    assert "Expected --output" in capsys.readouterr().err

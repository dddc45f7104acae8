"""The GPU day as a trial on the CPU: every part runs, is written down, and becomes a table."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_day, gpu_report
from benchmarks.gpu.session import OutOfTime, Session, Sizes, alarm
from benchmarks.gpu.subjects import clip_of, random_batch
from benchmarks.gpu.syncs import counted
from benchmarks.gpu.where import covered, kind_of

ROOT = Path(__file__).parents[2]
QUICK = [name for name in gpu_day.PARTS if name not in ("compile", "tests")]  # these two take a minute


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What the script wrote, as a process of its own."""
    folder = tmp_path_factory.mktemp("day")
    command = [sys.executable, "benchmarks/gpu_day.py", "--device", "cpu", "--out", str(folder)]
    command += ["--parts", ",".join(QUICK)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "gpu_day.json").read_text())


def test_every_part_ends_with_figures(result):
    assert {name: part["status"] for name, part in result["parts"].items()} == dict.fromkeys(QUICK, "done")
    assert all(part["rows"] for part in result["parts"].values())
    steps = result["parts"]["steps"]["rows"]
    assert {row["way"] for row in steps} == {"published", "fresh", "from host", "views"}
    assert {row["mode"] for row in steps} == {"bf16", "amp", "tf32", "bf16 without tf32", "fp32"}
    assert all(0 < row["seconds"] < 100 and 0 < row["ratio"] for row in steps)
    assert all(row["loss difference"] < 1e-4 for row in steps if row["mode"] in ("fp32", "tf32"))
    assert all(row["loss difference"] < 0.3 for row in steps)
    assert all(row["difference"] == 0 for row in result["parts"]["agreement"]["rows"])  # the CPU beside itself
    assert {row["part"] for row in result["parts"]["loading"]["rows"]} == {"loader", "training", "step"}


def test_the_document_gets_its_tables(result, tmp_path):
    day, document = tmp_path / "gpu_day.json", tmp_path / "PERFORMANCE.md"
    day.write_text(json.dumps(result))
    document.write_text(f"before\n\n{gpu_report.BEGIN}\nold\n{gpu_report.END}\n\nafter\n")
    assert gpu_report.main([str(day), "--document", str(document)]) == 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("\n### ") == len(QUICK) and text.count("| bf16, 5 classes, batch 3") == 4
    assert gpu_report.main([str(day), "--document", str(document)]) == 0 and document.read_text() == text
    assert gpu_report.main([str(tmp_path / "none.json")]) == 2


def test_a_part_that_fails_or_takes_too_long_leaves_what_it_has(tmp_path, monkeypatch, capsys):
    def slow(session):
        session.add(what="first")
        time.sleep(30)

    def broken(session):
        session.add(what="second")
        raise RuntimeError("no such kernel")

    def last(session):
        session.add(what="third")

    parts = {"slow": (slow, 480.0), "broken": (broken, 240.0), "last": (last, 240.0)}
    monkeypatch.setattr(gpu_day, "PARTS", parts)
    monkeypatch.setattr(gpu_day, "LEAST", 0.0)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--minutes", "0.01", "--parts", "slow,broken,last"]
    monkeypatch.setitem(parts, "slow", (slow, 160.0))
    start = time.monotonic()
    assert gpu_day.main(arguments) == 1
    assert time.monotonic() - start < 10
    found = json.loads((tmp_path / "gpu_day.json").read_text())["parts"]
    assert [found[name]["status"] for name in parts] == ["out of time", "failed", "done"]
    assert [found[name]["rows"][0]["what"] for name in parts] == ["first", "second", "third"]
    assert "no such kernel" in found["broken"]["error"] and "in broken" in found["broken"]["traceback"]
    assert "out of time" in capsys.readouterr().out


def test_wrong_arguments(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in ((["--parts", "facts,stepps"], "--parts to be some of"), ([], "Expected a GPU")):
        with pytest.raises(SystemExit) as ended:
            gpu_day.main(arguments)
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_an_alarm_is_no_exception_that_somebody_catches():
    with pytest.raises(OutOfTime), alarm(0.05):
        try:
            time.sleep(5)
        except Exception:
            pytest.fail("swallowed")
    with alarm(0.05):
        pass
    time.sleep(0.1)  # and it does not ring afterwards


def test_rows_are_saved_as_they_come():
    saved = []
    session = Session(torch.device("cpu"), "toy", Sizes(), Path(), lambda: saved.append(len(session.rows)))
    session.add(a=1)
    session.add(a=2)
    assert saved == [1, 2]


def test_a_part_may_be_the_first_to_ask_for_a_batch():
    session = Session(torch.device("cpu"), "toy", Sizes(), Path(), lambda: None)
    images, labels = random_batch(session, 3, 5, seed=0)
    side = clip_of(session, "fp32", session.device).image_size
    assert images.shape == (3, 3, side, side) and labels.shape == (3,) and int(labels.max()) < 5


def test_reads_of_values_are_counted_by_their_line():
    value = torch.ones(3)
    with counted(torch.device("cpu")) as places:
        bool(value.sum())
        float(value[0])
        value * 2
    assert sum(places.values()) == 2 and all(place.startswith("tests/benchmarks/") for place in places)


def test_time_that_kernels_cover_and_their_kinds():
    assert covered([(5, 6), (0, 2), (1, 3), (1.5, 1.6)]) == 4
    assert covered([]) == 0
    names = {"sm90_xmma_gemm_bf16": "matrix products", "pytorch_flash::flash_fwd_kernel": "attention"}
    names |= {"Memcpy HtoD (Pinned -> Device)": "copies", "void vectorized_elementwise_kernel<4>": "elementwise"}
    names |= {"multi_tensor_apply_kernel": "optimizer and checks", "something": "other"}
    assert {name: kind_of(name) for name in names} == names

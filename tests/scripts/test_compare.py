"""Comparisons of methods: real runs, real processes."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from programs import run_program

from dassl.engine import TRAINER_REGISTRY
from dassl.utils.checkpoints import POINTER_NAME
from scripts.compare import main
from scripts.lib.grid import digest_of_data
from scripts.lib.methods import choose_methods, methods_with
from scripts.lib.runs import read_records
from scripts.protocol import main as protocol_main

ROOT = Path(__file__).parents[2]
METHODS = "ZeroshotCLIP,LinearProbe"


def compare(output: Path, *arguments: str) -> subprocess.CompletedProcess:
    return run_program(["scripts/compare.py", "--shots", "1", "--output", str(output), *arguments], ROOT)


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    result = compare(folder, "--seeds", "1,2", "--trainers", METHODS, "--jobs", "2")
    assert result.returncode == 0, result.stderr
    return folder


def test_runs_what_is_missing_and_reads_what_is_there(output):
    stem = output / "compare" / "digits"
    with open(f"{stem}.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["method"] for row in rows] == METHODS.split(",")
    folder = output / "digits" / "LinearProbe" / "tiny_1shots"
    metrics = [json.loads((folder / f"seed{seed}" / "metrics.json").read_text()) for seed in (1, 2)]
    assert float(rows[1]["mean"]) == pytest.approx(sum(m["accuracy"] for m in metrics) / 2)
    assert metrics[0]["params"]["trainable"] == 10 * 128 + 10  # fitted, not trained by gradients
    names = {path.name for path in stem.parent.iterdir()}
    assert names == {*(f"digits{suffix}" for suffix in (".md", ".csv", ".tex", ".pdf", ".png")), "digits_runs.csv"}
    before = {path: path.stat().st_mtime_ns for path in output.rglob("metrics.json")}
    assert len(before) == 4
    assert main(["--shots", "1", "--seeds", "1,2", "--trainers", METHODS, "--output", str(output)]) == 0
    assert {path: path.stat().st_mtime_ns for path in output.rglob("metrics.json")} == before


def test_another_head_of_the_same_run_has_a_row(output, capsys):
    methods = "LinearProbe,LinearProbe/clip,ZeroshotCLIP"
    before = {path: path.stat().st_mtime_ns for path in output.rglob("metrics.json")}
    arguments = ["--shots", "1", "--seeds", "1,2", "--output", str(output), "--write", str(output / "heads" / "h")]
    assert main([*arguments, "--trainers", methods, "--lead", "LinearProbe"]) == 0
    with open(output / "heads" / "h.csv", newline="") as stream:
        probe, clip, zeroshot = csv.DictReader(stream)
    assert clip["mean"] == zeroshot["mean"] != probe["mean"]
    assert {path: path.stat().st_mtime_ns for path in output.rglob("metrics.json")} == before
    assert "LinearProbe against the best other method" in (output / "heads" / "h.md").read_text()
    assert main([*arguments, "--trainers", "LinearProbe/none"]) == 2
    assert "one of the heads clip, probe" in capsys.readouterr().err
    assert main([*arguments, "--trainers", "LinearProbe", "--lead", "CoOp"]) == 2
    assert protocol_main(["few-shot", "--trainers", "LinearProbe/clip", "--output", str(output)]) == 2
    assert "--heads all" in capsys.readouterr().err


def test_runs_in_a_list_are_not_run(output, tmp_path):
    listed, stem = output / "compare" / "digits_runs.csv", tmp_path / "both"
    before = (output / "compare" / "digits.md").read_text().split("###", 1)[1]
    arguments = ["--shots", "1", "--seeds", "1,2", "--output", str(tmp_path / "elsewhere"), "--write", str(stem)]
    arguments += ["--trainers", METHODS]
    assert main([*arguments, "--with", str(listed)]) == 0
    assert not list((tmp_path / "elsewhere").rglob("metrics.json"))  # nothing was run
    assert stem.with_suffix(".md").read_text().split("###", 1)[1] == before.split("### published")[0]
    assert (tmp_path / "both_runs.csv").read_text() == listed.read_text()
    assert main([*arguments, "--with", str(listed), "--metric", "ece"]) == 0
    assert [record["seed"] for record in read_records(listed)] == [1, 2, 1, 2]  # for plot_shots.py and report.py, too

    # A run that is missing from the list is run; one that is here counts, whatever the list says.
    lines = listed.read_text().splitlines()
    half = tmp_path / "half.csv"
    half.write_text("\n".join([*lines[:3], lines[4]]) + "\n")
    assert main([*arguments, "--with", str(half)]) == 0
    assert [path.parent.name for path in (tmp_path / "elsewhere").rglob("metrics.json")] == ["seed1"]
    half.write_text("\n".join([*lines[:3], re.sub(r"(?<=,1,1,)[^,]+", "0.5", lines[3]), lines[4]]) + "\n")
    assert ",1,1,0.5," in half.read_text()
    assert main([*arguments, "--with", str(half)]) == 0
    with open(tmp_path / "both_runs.csv", newline="") as new, open(listed, newline="") as old:
        assert [row["accuracy"] for row in csv.DictReader(new)] == [row["accuracy"] for row in csv.DictReader(old)]


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("accuracy", "many", "to be a number"),
        ("recipe", "99", "is of recipe 99"),
        ("options", "OPTIM.LR 1.0", "was given OPTIM.LR 1.0"),
        ("data", "0" * 64, "to be of the same images"),
        ("seed", None, "lacks seed"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(output, tmp_path, capsys, column, value, message):
    with open(output / "compare" / "digits_runs.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    rows[0][column] = value
    names = [name for name in rows[0] if not (value is None and name == column)]
    with open(tmp_path / "list.csv", "w", newline="") as stream:
        table = csv.DictWriter(stream, names, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    arguments = ["--shots", "1", "--seeds", "1,2", "--trainers", METHODS, "--output", str(tmp_path / "out")]
    assert main([*arguments, "--with", str(tmp_path / "list.csv")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_finished_run_with_other_settings_is_not_taken(output, capsys):
    arguments = ["--shots", "1", "--seeds", "1", "--trainers", "LinearProbe", "--output", str(output)]
    assert main([*arguments, "TRAINER.LINEARPROBE.C", "7.0"]) == 2
    assert "TRAINER.LINEARPROBE.C" in capsys.readouterr().err
    assert main([*arguments, "--read-only", "TRAIN.PRINT_FREQ", "3"]) == 0  # that changes no number


def test_a_finished_run_of_another_recipe_is_not_taken(output, capsys, monkeypatch):
    arguments = ["--shots", "1", "--seeds", "1", "--trainers", "LinearProbe", "--output", str(output)]
    monkeypatch.setattr(TRAINER_REGISTRY.get("LinearProbe"), "recipe", 77)
    assert main([*arguments, "--read-only"]) == 2
    assert "to be of recipe 77 of LinearProbe but it is of recipe 2" in capsys.readouterr().err


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path):
    result = compare(tmp_path, "--seeds", "1", "--trainers", METHODS, "TRAINER.LINEARPROBE.C", "-1.0")
    assert result.returncode == 1
    assert "failed (2)" in result.stderr and "TRAINER.LINEARPROBE.C" in result.stderr
    assert "ZeroshotCLIP" in result.stdout and "| LinearProbe" not in result.stdout


def test_stopping_stops_the_runs_and_the_same_command_goes_on(tmp_path):
    command = [sys.executable, "scripts/compare.py", "--shots", "16", "--seeds", "1", "--trainers", "TaskRes"]
    command += ["--output", str(tmp_path), "OPTIM.MAX_EPOCH", "60", "TRAIN.CHECKPOINT_FREQ", "1"]
    folder = tmp_path / "digits" / "TaskRes" / "tiny_16shots" / "seed1"
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    # Not the first file of a checkpoint: a run goes on from what its pointer names, which is written last.
    while not list(folder.glob(f"*/{POINTER_NAME}")) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.terminate()
    assert first.wait(60) == 130
    assert not (folder / "DONE").exists()
    number = len(list(folder.glob("*/model.pth.tar-*")))
    time.sleep(0.5)
    assert len(list(folder.glob("*/model.pth.tar-*"))) == number  # its process has gone too
    assert run_program(command[1:], ROOT).returncode == 0
    assert (folder / "DONE").exists()
    assert "Resum" in (folder / "console.txt").read_text() or "resum" in (folder / "console.txt").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset", "digit"], "configs/datasets"),
        (["--trainers", "DLRCLIPP"], "did you mean"),
        (["--trainers", "CLIPLoRA", "--config", "rn50"], "rn50.yaml of CLIPLoRA"),
        (["--config", "nothing"], "--config"),
        (["--shots", "1,x"], "--shots"),
        (["--jobs", "0"], "--jobs"),
        (["--read-only"], "finished runs"),
        (["--with", "nowhere.csv"], "to be a list of runs"),
        (["OPTIM.LR"], "no value"),
    ],
)
def test_bad_input_is_said_before_any_run(tmp_path, capsys, arguments, message):
    try:
        code = main(["--output", str(tmp_path / "none"), *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_all_methods_are_those_that_leave_the_dataset_open():
    names = [method.name for method in choose_methods("", "tiny")]
    assert names == list(methods_with("tiny")) and len(names) >= 16
    assert {"DLRCLIP", "ZeroshotCLIP", "CoOp", "TipAdapterF", "CLAP"} <= set(names)


@pytest.fixture
def photo_folders(tmp_path) -> tuple[Path, Path]:
    """Two folders of the same names and classes, of other images."""
    for number, root in enumerate(("first/photos", "second/photos")):
        for label, name in enumerate(("cat", "dog")):
            for i in range(6):
                path = tmp_path / root / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.effect_noise((40 + 8 * number, 40), 20 + 60 * label).convert("RGB").save(path)
    return tmp_path / "first" / "photos", tmp_path / "second" / "photos"


def test_a_finished_run_of_other_images_is_not_taken(photo_folders, tmp_path, capsys):
    first, second = photo_folders
    arguments = ["--dataset", "image_folder", "--shots", "1", "--seeds", "1", "--trainers", "LinearProbe"]
    arguments += ["--output", str(tmp_path / "out")]
    assert main([*arguments, "--root", str(first)]) == 0
    capsys.readouterr()
    assert main([*arguments, "--root", str(second)]) == 2
    assert "to be of the images that are now in" in capsys.readouterr().err
    protocol = ["few-shot", *arguments, "--root", str(second)]
    assert protocol_main(protocol) == 2 and "to be of the images" in capsys.readouterr().err
    metrics = tmp_path / "out" / "photos" / "LinearProbe" / "tiny_1shots" / "seed1" / "metrics.json"
    told = json.loads(metrics.read_text())
    metrics.write_text(json.dumps({key: value for key, value in told.items() if key != "data_digest"}))
    assert main([*arguments, "--root", str(first)]) == 2  # of an earlier version, which did not tell
    assert "it does not tell of which" in capsys.readouterr().err
    metrics.write_text(json.dumps(told))
    digest_of_data.cache_clear()  # what a new process would see
    shutil.rmtree(first / "cat")
    shutil.copytree(first / "dog", first / "cat")
    (first / "split.json").unlink()  # the same root, split anew
    assert main([*arguments, "--root", str(first)]) == 2
    digest_of_data.cache_clear()
    assert main([*arguments, "--read-only", "--root", str(first / "nothing")]) == 2  # misspelt
    assert digest_of_data("ImageFolder", "") == ""  # without a root the images may be elsewhere

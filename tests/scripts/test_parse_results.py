"""The means of a folder's runs, in the form that CoOp's users know."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from scripts.parse_results import log_result, main


def metrics_run(folder: Path, accuracy: float, done: bool = True, mode: str = "train") -> Path:
    folder.mkdir(parents=True)
    heads = {"clip": {"accuracy": 50.0}, "final": {"accuracy": accuracy, "macro_f1": 77.777, "ece": 3.0}}
    run = {"trainer": "T", "dataset": "D", "shots": 1, "seed": 1, "mode": mode, "split": "test"}
    (folder / "metrics.json").write_text(json.dumps({**run, "test": {"heads": heads, "main": "final"}}))
    (folder / "log.txt").write_text("Finish training\n* accuracy: 1.0%\n* average: 70.5%\n")
    if done:
        (folder / "DONE").write_text("{}")
    return folder


def log_run(folder: Path, *lines: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("\n".join(lines))
    return folder


def test_output_is_coops_from_unrounded_numbers(tmp_path, capsys) -> None:
    numbers = [87.0449, 87.0451, 90.0]
    for seed, number in enumerate(numbers, 1):
        metrics_run(tmp_path / f"seed{seed}", number)
    assert main([str(tmp_path)]) == 0
    mean, sd = statistics.fmean(numbers), statistics.pstdev(numbers)
    assert capsys.readouterr().out.splitlines() == [
        f"Parsing files in {tmp_path}",
        f"file: {tmp_path}/seed1/metrics.json. accuracy: 87.04%. ",
        f"file: {tmp_path}/seed2/metrics.json. accuracy: 87.05%. ",
        f"file: {tmp_path}/seed3/metrics.json. accuracy: 90.00%. ",
        "===",
        f"Summary of directory: {tmp_path}",
        f"* accuracy: {mean:.2f}% +- {sd:.2f}%",
        "===",
    ]
    assert main([str(tmp_path), "--ci95"]) == 0
    assert f"+- {1.96 * sd / math.sqrt(3):.2f}%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--keyword", "error"], "* error: 20.00%"),
        (["--keyword", "macro_f1"], "* macro_f1: 77.78%"),
        (["--keyword", "average"], "* average: 70.50%"),  # only the log has it
        (["--head", "clip"], "* accuracy: 50.00%"),
        (["--keyword", "ece"], "* ece: 3.00%"),
    ],
)
def test_other_results(tmp_path, capsys, options, shown) -> None:
    metrics_run(tmp_path / "seed1", 80.0)
    assert main([str(tmp_path), *options]) == 0 and shown in capsys.readouterr().out


def test_logs_of_other_programs(tmp_path, capsys) -> None:
    log_run(tmp_path / "seed1", "=> result", "* accuracy: 10.0%", "Finish training", "* accuracy: 8.1e1%", "x")
    log_run(tmp_path / "seed2", "Finish training", "=> result", "* accuracy: 1.0%", "x * accuracy: 83.0%")
    log_run(tmp_path / "seed3", "* accuracy: 99.0%", "not: Finish training")
    assert main([str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "* accuracy: 82.00% +- 1.00%" in captured.out
    assert f'left out: {tmp_path / "seed3"}: its log.txt has no line "Finish training"' in captured.err
    log_run(tmp_path / "eval", "=> result", "* accuracy: 10.0%", "* accuracy: 12.5%")
    assert log_result(tmp_path / "eval" / "log.txt", "accuracy", "=> result") == 12.5


def test_what_is_not_finished_is_named(tmp_path, capsys) -> None:
    metrics_run(tmp_path / "a", 80.0)
    metrics_run(tmp_path / "b", 0.0, done=False)
    metrics_run(tmp_path / "c", 60.0, mode="eval")
    log_run(tmp_path / "d", "Finish training", "* accuracy: 5.0%")
    (tmp_path / "d" / "environment.json").write_text("{}")  # ours, and died before metrics.json
    (tmp_path / "e").write_text("a stray file")
    (tmp_path / ".hidden").mkdir()
    assert main([str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "* accuracy: 80.00% +- 0.00%" in captured.out
    assert [line.split(": ")[1] for line in captured.err.splitlines()] == [str(tmp_path / x) for x in "bcde"]
    assert main([str(tmp_path), "--test-log"]) == 0
    assert "* accuracy: 70.00% +- 10.00%" in capsys.readouterr().out


def test_several_experiments(tmp_path, capsys) -> None:
    for name, number in (("one", 80.0), ("two", 90.0)):
        metrics_run(tmp_path / name / "seed1", number)
    assert main([str(tmp_path), "--multi-exp"]) == 0
    assert capsys.readouterr().out.endswith("===\nAverage performance\n* accuracy: 85.00%\n")


def test_nothing_to_count_is_an_error(tmp_path, capsys) -> None:
    metrics_run(tmp_path / "runs" / "a", 80.0, done=False)
    for command in ([tmp_path / "runs"], [tmp_path / "nowhere"], [tmp_path / "runs" / "a" / "DONE"]):
        assert main([str(command[0])]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: Expected")
    metrics_run(tmp_path / "good" / "a", 80.0)
    assert main([str(tmp_path / "good"), "--head", "none"]) == 2
    assert "a head out of clip, final but got none" in capsys.readouterr().err

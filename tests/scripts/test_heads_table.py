"""The table of heads over finished runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from programs import run_program

SCRIPT = Path(__file__).parents[2] / "scripts" / "heads_table.py"


def _run(folder: Path, seed: int, shots: int, done: bool = True, **heads: float) -> None:
    folder.mkdir(parents=True)
    run = {"dataset": "Digits", "trainer": "DLRCLIP", "shots": shots, "seed": seed, "accuracy": heads["clip"]}
    run["test"] = {"heads": {head: {"accuracy": value, "ece": value / 10} for head, value in heads.items()}, "n": 10}
    (folder / "metrics.json").write_text(json.dumps(run))
    if done:
        (folder / "DONE").write_text("{}")


def _table(*arguments: object) -> subprocess.CompletedProcess:
    return run_program([SCRIPT, *map(str, arguments)], Path.cwd())


def test_means_over_seeds_of_finished_runs(tmp_path) -> None:
    _run(tmp_path / "a" / "seed1", 1, 16, clip=50.0, final=80.0)
    _run(tmp_path / "a" / "seed2", 2, 16, clip=50.0, final=84.0)
    _run(tmp_path / "b" / "seed1", 1, 4, clip=50.0, final=60.0)
    _run(tmp_path / "b" / "seed2", 2, 4, done=False, clip=0.0, final=0.0)
    lines = _table(tmp_path).stdout.splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["dataset", "trainer", "shots", "seeds", "clip", "final"]
    assert cells[2] == ["Digits", "DLRCLIP", "4", "1", "50.0", "60.0"]
    assert cells[3] == ["Digits", "DLRCLIP", "16", "2", "50.0 (0.0)", "82.0 (2.8)"]
    assert "8.2 (0.3)" in _table(tmp_path, "--metric", "ece").stdout


def test_nothing_finished_and_a_run_twice_are_errors(tmp_path) -> None:
    _run(tmp_path / "a", 1, 16, done=False, clip=1.0)
    result = _table(tmp_path)
    assert result.returncode == 2 and "Expected finished runs" in result.stderr
    _run(tmp_path / "b", 1, 16, clip=1.0)
    _run(tmp_path / "c", 1, 16, clip=1.0)
    result = _table(tmp_path)
    assert result.returncode == 2 and "Expected one run" in result.stderr

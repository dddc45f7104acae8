"""Accuracy by shots: which runs are read, what is averaged, and what the figure shows."""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from scripts.figures.plot_shots import main, shots_figure, shots_panels
from scripts.figures.style import COLORS, look, readable, save
from scripts.lib.runs import find_runs, read_records, run_records
from scripts.lib.tables import mean_and_band


def make_run(folder: Path, accuracy: float, done: bool = True, part: str = "all", **facts: object) -> Path:
    folder.mkdir(parents=True)
    metrics = {"trainer": "DLRCLIP", "dataset": "Digits", "shots": 16, "seed": 1, "split": "test", **facts}
    metrics |= {"accuracy": accuracy, "test": {"heads": {"clip": {"accuracy": 50.0}, "final": {"accuracy": accuracy}}}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.yaml").write_text(f"DATASET:\n  SUBSAMPLE_CLASSES: {part}\n")
    if done:
        (folder / "DONE").write_text("{}")
    return folder


def record(dataset: str, method: str, shots: int, seed: int | None, accuracy: float) -> dict[str, object]:
    return {"dataset": dataset, "method": method, "shots": shots, "seed": seed, "accuracy": accuracy}


def test_bands_are_students_interval_or_the_standard_deviation() -> None:
    mean, half = mean_and_band([80.0, 84.0, 88.0])
    assert mean == 84.0 and half == pytest.approx(4.302653 * 4.0 / math.sqrt(3))  # t of 2 degrees, from a table
    assert mean_and_band([80.0, 84.0, 88.0], "sd") == (84.0, pytest.approx(4.0))
    assert math.isnan(mean_and_band([80.0])[1])
    assert mean_and_band([80.0, 84.0]) == (82.0, 2.0)  # the range
    assert mean_and_band([80.0, 84.0], "sd") == (82.0, pytest.approx(8.0**0.5))
    with pytest.raises(ValueError, match="Expected band to be one of t95, sd"):
        mean_and_band([80.0, 81.0], "se")


def test_average_is_over_the_datasets_and_shots_that_all_have() -> None:
    records = [record("A", "ours", k, s, 50 + k + s) for k in (1, 4) for s in (1, 2, 3)]
    records += [record("B", "ours", k, s, 70 + k + s) for k in (1, 4, 16) for s in (2, 3, 4)]
    records += [record("A", "theirs", 1, None, 40), record("B", "theirs", 1, None, 60)]
    records += [record("C", "ours", 1, 1, 99)]  # theirs has no C: left out of the average
    average, a, b, c = shots_panels(records, "sd")
    assert [p.title for p in (average, a, b, c)] == ["Average of 2 datasets", "A", "B", "C"]
    assert [p.shots for p in average.series["ours"]] == [1, 4]  # A has no 16
    point = average.series["ours"][0]
    assert point.n == 2 and point.mean == statistics.fmean([(53 + 73) / 2, (54 + 74) / 2])  # seeds 2 and 3
    assert point.half == pytest.approx(statistics.stdev([63, 64]))
    (theirs,) = average.series["theirs"]
    assert theirs.mean == 50 and math.isnan(theirs.half)


def test_twice_the_same_run_and_no_run_are_errors() -> None:
    with pytest.raises(ValueError, match="Expected one accuracy of m on A, 1 shots, seed 1 but got two"):
        shots_panels([record("A", "m", 1, 1, 50), record("A", "m", 1, 1, 51)])
    with pytest.raises(ValueError, match="Expected at least one accuracy"):
        shots_panels([])


def test_figure_has_a_panel_per_dataset_and_the_values_of_each_method() -> None:
    records = [record(d, "ours", k, s, 50 + k + s) for d in ("A", "B") for k in (1, 2, 16) for s in (1, 3)]
    records += [record(d, "zero", 0, None, 45.0) for d in ("A", "B")]
    figure = shots_figure(records)
    assert [axes.get_title() for axes in figure.axes] == ["Average of 2 datasets", "A", "B"]
    for axes in figure.axes:
        lines = {line.get_label(): line for line in axes.get_lines() if not str(line.get_label()).startswith("_")}
        assert np.asarray(lines["ours"].get_xdata()).tolist() == [0, 1, 4]
        assert np.asarray(lines["ours"].get_ydata()).tolist() == [53, 54, 68]
        assert np.asarray(lines["zero"].get_ydata()).tolist() == [45] and lines["zero"].get_marker() == "*"
        assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "2", "16"]
        assert axes.collections, "no band"
    texts = [t.get_text() for t in figure.legends[0].get_texts()]
    assert texts == ["ours", "zero", "95 % t-interval of the mean over seeds (of two seeds: their range)"]


@pytest.mark.parametrize(
    ("seeds", "end"), [((1,), None), ((1, 2, 3), "over seeds"), ((1, 2), "of two seeds: their range)")]
)
def test_the_legend_says_what_the_bands_are(seeds, end) -> None:
    figure = shots_figure([record("A", "ours", k, s, 50 + k + s) for k in (1, 2) for s in seeds])
    last = figure.legends[0].get_texts()[-1].get_text()
    assert last == "ours" if end is None else last.endswith(end)


def test_looks_differ_without_color_too() -> None:
    looks = [look(i) for i in range(72)]
    assert len(set(looks)) == 72 and len({(m, s) for _, m, s in looks[:8]}) == 8
    assert len({to_hex(c) for c in COLORS}) == len(COLORS)


def test_names_are_one_printable_line() -> None:
    assert readable("a\nb\tc\x00 <b>$x$") == "a b c? <b>$x$"
    assert readable("abcdefghij", 5) == "ab…ij"


def test_runs_of_any_depth_are_found_and_unfinished_ones_named(tmp_path) -> None:
    make_run(tmp_path / "a" / "deep" / "er" / "seed1", 80.0)
    make_run(tmp_path / "b", 60.0, part="base")
    make_run(tmp_path / "z", 55.0, trainer="ZeroshotCLIP", shots=-1)
    broken = make_run(tmp_path / "c", 0.0, done=False)
    runs, unfinished = find_runs([tmp_path, f"again={tmp_path}"])
    assert unfinished == [broken] and len(runs) == 3
    found = {(r["dataset"], r["method"], r["shots"]): r["accuracy"] for r in run_records(runs)}
    assert found == {
        ("Digits", "DLRCLIP", 16): 80.0,
        ("Digits (base)", "DLRCLIP", 16): 60.0,
        ("Digits", "ZeroshotCLIP", 0): 55.0,
    }
    heads = run_records(find_runs([f"mine={tmp_path / 'a'}"])[0], ["clip", "final"])
    assert [(r["method"], r["accuracy"]) for r in heads] == [("mine clip", 50.0), ("mine final", 80.0)]
    with pytest.raises(ValueError, match="Expected runs with the head none but found none"):
        run_records(runs, ["none"])
    make_run(tmp_path / "twin", 81.0)
    with pytest.raises(ValueError, match="tell them apart as NAME=FOLDER"):
        run_records(find_runs([tmp_path])[0])
    with pytest.raises(ValueError, match="Expected a folder of runs but got"):
        find_runs([tmp_path / "nowhere"])


def test_published_numbers(tmp_path) -> None:
    path = tmp_path / "published.csv"
    path.write_text("accuracy,shots,method,dataset,note\n71.5,16,Paper,Digits,x\n")
    assert read_records(path) == [record("Digits", "Paper", 16, None, 71.5)]
    path.write_text("dataset,method,shots,seed,accuracy\nDigits,Paper,16,2,71.5\nDigits,Paper,few,2,71.5\n")
    with pytest.raises(ValueError, match="line 3"):
        read_records(path)
    path.write_text("dataset,method,accuracy\n")
    with pytest.raises(ValueError, match="to have the column shots"):
        read_records(path)


def test_the_command_writes_the_same_files_twice(tmp_path, capsys) -> None:
    make_run(tmp_path / "runs" / "1", 80.0)
    make_run(tmp_path / "runs" / "2", 81.0, seed=2)
    make_run(tmp_path / "runs" / "cut", 10.0, done=False)
    with open(tmp_path / "p.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["dataset", "method", "shots", "accuracy"], ["Digits", "<b>$\\frac", 1, 70]])
    for name in ("one", "two"):
        command = [str(tmp_path / "runs"), "--csv", str(tmp_path / "p.csv"), "--formats", "pdf", "svg", "png"]
        assert main([*command, "--output", str(tmp_path / name / "shots")]) == 0
    captured = capsys.readouterr()
    assert f"left out, not finished: {tmp_path / 'runs' / 'cut'}" in captured.err
    for kind in ("pdf", "svg", "png"):
        first, second = ((tmp_path / name / f"shots.{kind}").read_bytes() for name in ("one", "two"))
        assert first == second and len(first) > 1000
    assert main([str(tmp_path / "p.csv")]) == 2 and "Expected a folder of runs" in capsys.readouterr().err


def test_files_are_written_beside_names_with_dots(tmp_path) -> None:
    figure = shots_figure([record("A", "m", 1, 1, 50)])
    assert save(figure, tmp_path / "new" / "v1.0", ["png"]) == [tmp_path / "new" / "v1.0.png"]

"""The benchmarks as commands at toy size, and the document made from their results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_eval, bench_memory, bench_step, frozen_methods, report
from benchmarks.bench_end_to_end import waiting_share
from benchmarks.flops import Product
from benchmarks.measure import MatrixRate
from benchmarks.report import BEGIN, END, replace_section

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder with a results file of each benchmark of the network; the first as a process of its own."""
    folder = tmp_path_factory.mktemp("results")
    toy = ["--model", "toy", "--threads", "1", "--json"]
    first = [*toy, str(folder / "bench_step.json"), "--classes", "10", "--batch", "2", "--steps", "1"]
    command = [sys.executable, "benchmarks/bench_step.py", *first, "--naive-chunk", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|") > 20
    threads = torch.get_num_threads()
    for module, arguments in {
        bench_eval: ["--classes", "10", "--images", "5", "--batch", "3"],
        bench_memory: ["--classes", "5", "--batch", "2"],
    }.items():
        name = module.__name__.rpartition(".")[2]
        assert module.main([*toy, str(folder / f"{name}.json"), *arguments]) == 0
    torch.set_num_threads(threads)
    return folder


def read(results, script):
    return json.loads((results / f"{script}.json").read_text())


def test_step(results):
    found = read(results, "bench_step")
    for key in ("ratio_fresh", "ratio_views", "floor_ratio", "peak_memory_ratio"):
        assert 0 < found[key] < 1000
    assert 0 <= found["loss_diff"] <= 1e-4
    assert 0 <= found["grad_diff"] <= 1e-3
    assert found["ratio_fresh"] == pytest.approx(found["seconds"]["naive"] / found["seconds"]["fresh"])
    assert found["naive_chunk"] == 4
    assert {"torch", "threads", "date", "cpu"} <= set(found["machine"])
    assert set(found["flops"]) == set(found["profile"]) | {"naive"} == {"naive", "fresh", "views"}


def test_evaluation(results):
    found = read(results, "bench_eval")
    assert found["logit_diff"] < 0.01
    speed = found["images_per_second"]
    assert found["ratio"] == pytest.approx(speed["ours"] / speed["naive"])
    assert list(found["flop_ratio"]) == ["naive", "ours", "features", "hidden"]


def test_memory(results):
    rows = {row["option"]: row for row in read(results, "bench_memory")["rows"]}
    assert len(rows) == 5
    assert rows["as published"]["activations"] > rows["accelerated"]["activations"]


def test_report(results, tmp_path):
    document = tmp_path / "PERFORMANCE.md"
    document.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    assert report.main([str(results), "--document", str(document)]) == 0
    text = document.read_text()
    assert text.startswith("before\n\n" + BEGIN) and text.endswith(END + "\n\nafter\n")
    assert "old" not in text
    assert text.index("### Training step: toy, 10 classes") < text.index("### Evaluation of 5 images: toy, 10 classes")
    assert report.main([str(results), "--document", str(document)]) == 0
    assert document.read_text() == text


def test_report_without_results(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "Expected results files" in capsys.readouterr().err
    with pytest.raises(ValueError, match="Expected the document"):
        replace_section("nothing marked", "new")


@pytest.mark.parametrize(("module", "option"), [(bench_step, "--steps"), (bench_eval, "--images")])
def test_wrong_arguments(module, option, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main([option, "0"])
    assert ended.value.code == 2 and "Expected --" in capsys.readouterr().err


def test_share_of_waiting():
    line = "epoch [{}/2] batch [{}/10] time 9 ({}) data 9 ({}) loss 1.0 (1.0)\n"
    log = line.format(1, 5, 7, 7) + line.format(1, 10, 0.3, 0.1) + line.format(2, 10, 0.1, 0.0)
    assert waiting_share(log) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="line at the end"):
        waiting_share("nothing")


def test_seconds_of_products_are_those_of_their_shapes():
    products = [Product("a", 8, 16, 32), Product("a", 8, 16, 32, times=3), Product("b", 4, 4, 4, batch=6)]
    rate = MatrixRate(torch.device("cpu"), torch.float32, products)
    rate._times = {(1, 8, 16, 32): [1.0, 5.0, 2.0], (6, 4, 4, 4): [10.0]}
    assert rate.seconds(products) == pytest.approx(4 * 2.0 + 10.0)
    del rate._times[6, 4, 4, 4]  # one too small to be timed counts at the rate of the others
    assert rate.seconds(products) == pytest.approx(8.0 * (4 * 8192 + 768) / (4 * 8192))


def test_methods_on_frozen_features(tmp_path, monkeypatch):
    """Each is measured in a process of its own; one that takes too long is named."""
    small = ["--rows", "20", "--classes", "10", "--queries", "30", "--width", "32", "--views", "2", "--val", "1"]
    result = tmp_path / "frozen.json"
    assert frozen_methods.main(["--methods", "TipAdapterF", *small, "--json", str(result)]) == 0
    (row,) = json.loads(result.read_text())["rows"]
    assert (row["method"], row["epochs"], row["views"]) == ("TipAdapterF", 1, 2)
    assert 0 < row["before"] <= row["peak"] and row["fit"] > 0 and row["test"] > 0
    assert row["selected"] and all(choice["on"] == "val" for choice in row["selected"].values())

    def stop(command, timeout, **arguments):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(frozen_methods.subprocess, "run", stop)
    found = frozen_methods.run(frozen_methods.parse_args(["--methods", "GDA", "--limit", "3"]), [])
    assert found["rows"] == [
        {"method": "GDA", "error": "more than 3 s"}
    ] and "more than 3 s" in frozen_methods.markdown(found)
    for wrong in (["--methods", "CoOp"], ["--width", "40"], ["--rows", "5", "--classes", "6"]):
        with pytest.raises(SystemExit):
            frozen_methods.parse_args(wrong)

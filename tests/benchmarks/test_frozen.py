"""Methods on frozen features beside the published computation, at toy size."""

import json

import pytest
import torch

from benchmarks import bench_frozen, side_by_side
from benchmarks.bench_frozen import BEGIN, END, Run, compare, measure, parse_args
from benchmarks.published.frozen import LEFT_OUT, METHODS
from dassl.data.datasets import DATASET_REGISTRY
from dassl.engine import TRAINER_REGISTRY
from trainers.base import FeatureTrainer

SMALL = ["--rows", "24", "--classes", "6", "--queries", "40", "--width", "64", "--views", "2", "--val", "3"]
SMALL += ["--epochs", "2", "--rounds", "1"]


@pytest.fixture(autouse=True)
def no_traces(monkeypatch):
    """The random features are a dataset for these tests only; PyTorch's threads are as before."""
    monkeypatch.setattr(DATASET_REGISTRY, "_obj_map", dict(DATASET_REGISTRY._obj_map))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", METHODS)
def test_ours_comes_to_what_is_published(name):
    """Else `measure` raises; what is chosen is compared there, too."""
    known = TRAINER_REGISTRY.get(name)
    row = measure(parse_args(SMALL), name)
    assert row["difference"] <= 1e-4 and row["other"] == 0
    assert (row["fit"] is None) == (not METHODS[name].fits) == (row["ratio_fit"] is None)
    assert row["test"]["ours"] > 0 and row["ratio_test"] > 0
    assert TRAINER_REGISTRY.get(name) is known  # the trainer on random features has not taken its place


def test_a_published_computation_takes_the_batches_of_the_trainer():
    """The rows of each epoch are known beforehand: 24 images in two views, in batches of 8."""
    row = measure(parse_args([*SMALL[:-2], "--rounds", "2"]), "AMUTuning")
    assert row["steps"] == 6 and [len(times) for times in row["rounds"]["fit"].values()] == [2, 2]


def test_a_difference_is_an_error():
    run = Run(torch.eye(4), {"alpha": 0.1}, 1.0, 1.0)
    assert compare("GDA", run, run) == (0.0, 0)
    for other in (run._replace(logits=torch.eye(4) + 0.01), run._replace(chosen={"alpha": 0.2})):
        with pytest.raises(RuntimeError, match="Expected GDA to come to what is published"):
            compare("GDA", other, run)
    lost = run._replace(logits=torch.full((4, 4), torch.nan))
    with pytest.raises(RuntimeError, match="nan"):
        compare("GDA", lost, run)


def test_each_trainer_on_frozen_features_is_compared_or_left_out_for_a_reason():
    known = TRAINER_REGISTRY.registered_names()
    frozen = {name for name in known if issubclass(TRAINER_REGISTRY.get(name), FeatureTrainer)}
    assert set(METHODS) | set(LEFT_OUT) == frozen and not set(METHODS) & set(LEFT_OUT)
    assert all(LEFT_OUT.values())


def test_the_command_writes_a_file_and_a_table(tmp_path, capfd):
    """Of several methods, each has a process of its own; rows of others in the file stay."""
    file, document = tmp_path / "frozen.json", tmp_path / "PERFORMANCE.md"
    document.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    where = [*SMALL, "--output", str(file)]
    assert bench_frozen.main([*where, "--methods", "StatA,GDA"]) == 0
    assert bench_frozen.main([*where, "--methods", "TipAdapter", "--document", str(document)]) == 0
    tip, _, stata = json.loads(file.read_text())["rows"]
    assert (tip["method"], tip["cut"], stata["method"], stata["fit"]) == ("TipAdapter", "10 of 200 beta", "StatA", None)
    assert tip["ratio_fit"] == pytest.approx(tip["fit"]["published"] / tip["fit"]["ours"])
    text = document.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| TipAdapter" in text and "| StatA" in text
    assert "TipAdapter" in capfd.readouterr().out


def test_a_method_that_fails_is_told(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(side_by_side, "measure_apart", lambda *arguments: None)
    document = tmp_path / "PERFORMANCE.md"
    document.write_text("untouched")
    assert bench_frozen.main([*SMALL, "--methods", "GDA,TIMO", "--document", str(document)]) == 1
    assert document.read_text() == "untouched"


def test_wrong_arguments(capsys):
    wrong = {
        "DAC": ["--methods", "DAC"],
        "--rounds": ["--rounds", "0"],
        "--classes": ["--classes", "2"],
        "multiple of --classes": ["--rows", "150"],
        "multiple of 32": ["--width", "40"],
    }
    for told, arguments in wrong.items():
        with pytest.raises(SystemExit):
            parse_args(arguments)
        assert told in capsys.readouterr().err

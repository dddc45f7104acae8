"""The cache of features over whole runs: the same numbers, --no-cache, and the script that shows what there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dassl.engine.hooks.tensorboard import TensorBoard
from scripts import feature_cache
from trainers.app import train

ROOT = Path(train.__file__).parents[2]
CONFIG = "configs/trainers/tip_adapter/tiny.yaml"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, random_tiny):
    """Folder of the runs plain (--no-cache), first and second and of their cache; its files after each run."""
    folder = tmp_path_factory.mktemp("runs")
    cache, states = folder / "features", {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(TensorBoard, "_pictures", staticmethod(lambda *_: None))  # drawing takes most of the time
        for name, flags in (("plain", ["--no-cache"]), ("first", []), ("second", [])):
            command = ["--trainer", "TipAdapter", "--config-file", CONFIG, *flags, "--output-dir", str(folder / name)]
            command += ["MODEL.BACKBONE.WEIGHTS", str(random_tiny), "FEATURE_CACHE.DIR", str(cache)]
            command += ["DATASET.NUM_SHOTS", "1", "USE_CUDA", "False"]
            command += ["TRAINER.TIPADAPTER.VIEWS", "2", "TRAINER.TIPADAPTER.SEARCH_STEP", "(3, 3)"]
            assert train.main(command) == 0
            states[name] = {path.name: path.read_bytes() for path in cache.glob("*.safetensors")}
    return folder, states


def metrics(folder):
    return {k: v for k, v in json.loads((folder / "metrics.json").read_text()).items() if k != "timing"}


def test_the_same_command_twice_and_without_cache_gives_the_same_metrics(runs):
    folder, _ = runs
    assert metrics(folder / "plain") == metrics(folder / "first") == metrics(folder / "second")


def test_no_cache_writes_nothing_and_the_second_run_reads_what_the_first_kept(runs):
    folder, states = runs
    assert states["plain"] == {} and len(states["first"]) == 3
    assert states["second"] == states["first"]
    lines = {name: (folder / name / "log.txt").read_text().count("from the cache in") for name in states}
    assert lines == {"plain": 0, "first": 0, "second": 3}


def test_show_and_clear(runs, capsys):
    where = ["--folder", str(runs[0] / "features")]
    assert feature_cache.main(["show", *where]) == 0
    header, _, *rows, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["dataset", "split", "model", "precision", "images", "views", "seed", "MiB", "last", "use"]
    assert sorted(row.split()[:6] for row in rows) == [
        ["Digits", "test", "tiny", "fp32", "540", "1"],
        ["Digits", "train", "tiny", "fp32", "10", "2"],
        ["Digits", "val", "tiny", "fp32", "10", "1"],
    ]
    assert total.startswith("Holds 3 entries")
    (path, *_) = (runs[0] / "features").glob("*.safetensors")
    path.write_bytes(b"nonsense")
    feature_cache.main(["show", *where])
    assert "?" in capsys.readouterr().out
    feature_cache.main(["clear", *where])
    assert capsys.readouterr().out.startswith("Removed 3 entries")
    assert not list(path.parent.glob("*.safetensors"))


def test_show_where_nothing_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DLR_CLIP_CACHE", str(tmp_path))
    feature_cache.main(["show"])
    assert capsys.readouterr().out == f"Holds 0 entries, 0.0 MiB: {tmp_path / 'features'}\n"
    assert list(tmp_path.iterdir()) == []

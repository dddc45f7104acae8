"""Classifiers on a backbone that is taken as a whole: fit, automatic choice, file, predict.py, exports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_towers import known_towers
from safetensors import safe_open

from trainers import FewShotClassifier
from trainers.api import auto
from trainers.api.export import ExportError, onnx_file
from trainers.app.predict import main as predict

pytest.importorskip("transformers", reason="pip install transformers")
ROOT = Path(__file__).parents[3]
SIGLIP = "open_clip:small-siglip"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    with known_towers(tmp_path_factory.mktemp("towers"), ("small-siglip",)) as files:
        yield str(files["small-siglip"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "seed1"


@pytest.fixture(scope="module")
def probe(weights, photos, run):
    settings = {"TRAINER.LINEARPROBE.VIEWS": 0, "INPUT.SQUASH": True}
    options = {"weights": weights, "settings": settings, "output_dir": str(run), "calibration": None}
    return FewShotClassifier("LinearProbe", SIGLIP, **options).fit(*photos)


def test_a_file_and_predict_py_give_the_same(probe, weights, photos, run, tmp_path, capsys):
    expected = probe.predict_proba(photos[0])
    file = tmp_path / "model.safetensors"
    probe.save(file)
    again = FewShotClassifier.load(file, weights=weights)
    np.testing.assert_array_equal(again.predict_proba(photos[0]), expected)
    with safe_open(file, framework="pt") as stream:
        record = json.loads(stream.metadata()["dlr_clip"])
    assert record["backbone"] == SIGLIP and "/tmp" not in json.dumps(record)
    assert record["preprocessing"]["size"] == [160, 160] and record["preprocessing"]["squash"] is True
    assert predict(["--model-dir", str(run), "--cpu", photos[0][0]]) == 0
    assert probe.predict(photos[0][:1])[0] in capsys.readouterr().out


def test_the_automatic_choice_leaves_out_what_it_cannot_do(weights, photos, monkeypatch):
    monkeypatch.setattr(auto, "CANDIDATES", (auto.CANDIDATES[0], auto.CANDIDATES[-1]))
    rows = [row for row in range(len(photos[0])) if row % 6 < 3]
    images, labels = ([part[row] for row in rows] for part in photos)
    clf = FewShotClassifier("auto", SIGLIP, weights=weights, time_limit=600).fit(images, labels)
    report = str(clf.report())
    assert "needs a plain CLIP, whose blocks it adapts" in report
    assert "DLRCLIP (training-free)" in report and set(clf.predict(photos[0])) <= {"red", "green", "blue"}


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_an_export_gives_its_probabilities(format, probe, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "EXPORTERS", ("torchscript", "dynamo"))  # the older one is much faster
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason='pip install "dlr-clip[export]"')
    file = tmp_path / "model"
    report = probe.export(file, format, images=photos[0])
    assert file.is_file() and max(row.difference for row in report.rows) < 1e-5


def test_what_cannot_be_exported_leaves_nothing(weights, photos, tmp_path):
    clf = FewShotClassifier("ZeroshotCLIP", SIGLIP, weights=weights, calibration=None).fit(*photos)
    with pytest.raises(ExportError, match=r"format openclip but open_clip:small-siglip is taken as a whole.*nothing"):
        clf.export(tmp_path / "folder", "openclip", images=photos[0])
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_needs_blocks_ends_in_one_line(tmp_path, photos):
    root = str(Path(photos[0][0]).parents[1])
    command = [sys.executable, "train.py", "--trainer", "CoOp", "--config", "vit_b16", "--root", root]
    command += ["--output-dir", str(tmp_path / "run"), "MODEL.BACKBONE.NAME", "open_clip:ViT-B-16-SigLIP/webli"]
    done = subprocess.run([*command, "USE_CUDA", "False"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "to be a plain CLIP" in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr

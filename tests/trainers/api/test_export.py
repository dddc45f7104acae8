"""Exports: what ONNX, TorchScript and open_clip make of a file is what predict.py says; nothing else is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dassl.data.transforms import build_transform
from dassl.engine import TRAINER_REGISTRY
from dassl.utils import InputError
from scripts.export import main
from trainers import FewShotClassifier
from trainers.api.export import ExportError, exporting, formats_of
from trainers.api.export.forms import PLAIN
from trainers.api.export.onnx_file import KEY, read_record, to_onnx
from trainers.app.predict import main as predict
from trainers.app.train import main as train
from trainers.clip.tiny import save_tiny

onnxruntime = pytest.importorskip("onnxruntime", reason='pip install "dlr-clip[export]"')
pytest.importorskip("onnxscript", reason='pip install "dlr-clip[export]"')

NAMES = TRAINER_REGISTRY.registered_names()
EXPORTED = [name for name in NAMES if formats_of(TRAINER_REGISTRY.get(name))]
REFUSED = sorted(set(NAMES) - set(EXPORTED))
# Exporting takes a second for each block, so the CLIP here has two: one before the last, and the last.
SHALLOW = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
QUICK = {
    "DLRCLIP": {"START": 1},
    "MMA": {"ADAPTER_START": 1, "ADAPTER_SCALE": 0.5},
    "RLA": {"VIEWS": 2},
    "ProLIP": {"VIEWS": 2},
    "EMDirichlet": {"ITER_MM": 20},
}


@pytest.fixture(scope="module")
def shallow(tmp_path_factory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**SHALLOW)
        with torch.no_grad():
            model.logit_scale.fill_(4.6052)
    folder = tmp_path_factory.mktemp("shallow")
    save_tiny(model, set(open_clip.tokenize("a photo of red green blue .").flatten().tolist()), {}, folder)
    return folder


@pytest.fixture(scope="module")
def fit(shallow, photos):
    """Fit a method on the shallow CLIP for an epoch."""

    def fit(name, settings=None, weights=None, **options):
        node = TRAINER_REGISTRY.get(name).config_node()
        few = {f"TRAINER.{node}.{key}": value for key, value in QUICK.get(name, {}).items()}
        return FewShotClassifier(
            name, "tiny", weights=str(weights or shallow), calibration=None,
            settings={"OPTIM.MAX_EPOCH": 1, **few, **(settings or {})}, **options,
        ).fit(*photos)  # fmt: skip

    return fit


def inputs_of(clf, paths):
    transform = build_transform(clf._trainer.cfg, is_train=False)
    return np.stack([transform(Image.open(path)).numpy() for path in paths])


def run_onnx(file, images):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


@pytest.fixture(scope="module")
def probe(fit, tmp_path_factory):
    """A linear probe, its file, and its ONNX file."""
    folder = tmp_path_factory.mktemp("probe")
    clf = fit("LinearProbe", unknown=0.4)
    clf.temperature_ = 2.5
    clf.save(folder / "probe.safetensors")
    report = clf.export(folder / "probe.onnx")
    return clf, folder, report

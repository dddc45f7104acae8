"""Exports: what ONNX, TorchScript and open_clip make of a file is what predict.py says; nothing else is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from error_lines import assert_one_line
from PIL import Image
from safetensors.torch import load_file
from small_clip import write_small_clip

from dassl.data.transforms import build_transform
from dassl.engine import TRAINER_REGISTRY
from dassl.utils import InputError
from scripts.export import main
from trainers import FewShotClassifier
from trainers.api.export import ExportError, export_model, exporting, formats_of, forms, onnx_file
from trainers.api.export.forms import PLAIN
from trainers.api.export.onnx_file import KEY, read_record
from trainers.app.train import main as train
from trainers.clip import load_clip
from trainers.features.corrected import save_adapters
from trainers.modules.overlap_adapters import IMOAdapters

ROOT = Path(__file__).parents[3]

onnx = pytest.importorskip("onnx", reason='pip install "dlr-clip[export]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='pip install "dlr-clip[export]"')
pytest.importorskip("onnxscript", reason='pip install "dlr-clip[export]"')

NAMES = TRAINER_REGISTRY.registered_names()
EXPORTED = [name for name in NAMES if formats_of(TRAINER_REGISTRY.get(name))]
REFUSED = sorted(set(NAMES) - set(EXPORTED))
# The exporters take seconds, the more the more blocks there are. So the CLIP here has two: the last, and one before it.
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
    "MMRL": {"REP_START": 2},
    "MMRLPP": {"REP_START": 2},
}


@pytest.fixture(scope="module")
def shallow(tmp_path_factory) -> Path:
    return write_small_clip(tmp_path_factory.mktemp("shallow"), SHALLOW, "a photo of red green blue .")


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


@pytest.fixture(scope="module")
def shallow_adapters(shallow, tmp_path_factory) -> Path:
    clip = load_clip("tiny", shallow)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapters = IMOAdapters(clip.visual.widths, 4)
        for p in adapters.parameters():
            torch.nn.init.normal_(p, std=0.1)
    path = tmp_path_factory.mktemp("adapters") / "imo_adapters.safetensors"
    save_adapters(path, adapters, clip, {"trainer": "random"})
    return path


def inputs_of(clf, paths):
    transform = build_transform(clf._trainer.cfg, is_train=False)
    return np.stack([transform(Image.open(path)).numpy() for path in paths])


def run_onnx(file, images):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def record_of(file):
    return json.loads(read_record(file)[KEY])


@pytest.fixture(scope="module")
def probe(fit, tmp_path_factory):
    """A linear probe that is saved, and its file."""
    clf = fit("LinearProbe", unknown=0.4)
    clf.temperature_ = 2.5
    file = tmp_path_factory.mktemp("probe") / "probe.safetensors"
    clf.save(file)
    return clf, file


# ----------------------------------------------------------------------------------------------------- every method


def test_only_transductive_methods_are_refused():
    assert REFUSED == ["EMDirichlet", "StatA", "TransCLIP"]
    assert set(PLAIN) <= set(NAMES)


# Exporters before torch 2.7 cannot write these (docs/EXPORT.md).
OLD_TORCH = torch.__version__ < "2.7"
NEWER = {"APE", "APET", "CoCoOp", "DAC", "TipAdapter", "TipAdapterF", "TipAdapterPP", "TipX", "TipXPP"}


@pytest.mark.parametrize("name", EXPORTED)
def test_every_method_gives_its_probabilities_in_onnx(
    name, fit, shallow, shallow_adapters, photos, tmp_path, monkeypatch
):
    """Where torch's older exporter can do it, by that: it takes a tenth of the time."""
    if OLD_TORCH and name in NEWER:
        pytest.skip("needs torch 2.7")
    monkeypatch.setattr(onnx_file, "EXPORTERS", ("torchscript", "dynamo"))
    file = tmp_path / "model.onnx"
    if TRAINER_REGISTRY.get(name).adapters == "needed":  # such a classifier is not saved, its run is exported
        run = tmp_path / "run"
        clf = fit(name, {"MODEL.IMO_WEIGHTS": str(shallow_adapters)}, output_dir=str(run))
        report = export_model(run, file, images=photos[0])
    else:
        clf = fit(name)
        report = clf.export(file)
    assert report.difference < 1e-4 and report.files == (file,)
    images, expected = inputs_of(clf, photos[0][::5]), clf.predict_proba(photos[0][::5])
    for count in (1, 3):
        np.testing.assert_allclose(run_onnx(file, images[:count]), expected[:count], atol=1e-4)
    assert record_of(file)["method"] == name and record_of(file)["classes"] == clf.classes_.tolist()


@pytest.mark.skipif(OLD_TORCH, reason="needs torch 2.7")
def test_the_newer_exporter_comes_first(fit, photos, tmp_path):
    clf, file = fit("DLRCLIP"), tmp_path / "model.onnx"
    clf.export(file, images=photos[0])
    assert record_of(file)["exporter"] == "dynamo"
    images, expected = inputs_of(clf, photos[0][::5]), clf.predict_proba(photos[0][::5])
    for count in (1, 3):
        np.testing.assert_allclose(run_onnx(file, images[:count]), expected[:count], atol=1e-4)


@pytest.mark.parametrize("name", ["CoCoOp", "DLRCLIP", "GDA", "MMA", "TipX"])
def test_torchscript_gives_the_probabilities(name, fit, photos, tmp_path):
    clf, file = fit(name), tmp_path / "model.pt"
    clf.export(file, "torchscript")
    extra = {"dlr_clip.json": ""}
    loaded = torch.jit.load(str(file), _extra_files=extra)
    record = json.loads(extra["dlr_clip.json"])
    assert record["method"] == name and record["measured"]["rows"][1]["name"] == "model.pt"
    images, expected = inputs_of(clf, photos[0][::5]), clf.predict_proba(photos[0][::5])
    for count in (1, 3):
        np.testing.assert_allclose(loaded(torch.from_numpy(images[:count])), expected[:count], atol=1e-4)
    assert str(ROOT).encode() not in file.read_bytes() and b"site-packages" not in file.read_bytes()
    assert not [entry for entry in zipfile.ZipFile(file).namelist() if "traced_inputs" in entry]  # images of the user


@pytest.mark.parametrize("name", REFUSED)
def test_transductive_methods_are_refused(name, fit, tmp_path):
    with pytest.raises(InputError, match=f"a format that {name} has .none. .* classifies all images together"):
        fit(name).export(tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------- open_clip


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_open_clip_gives_the_probabilities(name, fit, photos, tmp_path):
    clf, folder = fit(name), tmp_path / "model"
    clf.export(folder, "openclip")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    features = load_file(folder / "class_features.safetensors")["features"]
    images = torch.stack([transform(Image.open(path)) for path in photos[0][::5]])
    with torch.no_grad():
        found = model.eval().encode_image(images, normalize=True) @ features.t() * model.logit_scale.exp()
    np.testing.assert_allclose(found.softmax(dim=1), clf.predict_proba(photos[0][::5]), atol=1e-4)


def test_open_clip_s_texts_are_the_ones_that_were_learnt_with(fit, tmp_path):
    clf, folder = fit("CLIPLoRA"), tmp_path / "model"
    clf.export(folder, "openclip")
    open_clip.add_model_config(_architecture(folder, tmp_path / "shallow-lora.json"))
    model, _, _ = open_clip.create_model_and_transforms(
        "shallow-lora", pretrained=str(folder / "open_clip_model.safetensors")
    )
    with torch.no_grad():
        texts = model.encode_text(open_clip.tokenize([f"a photo of a {name}." for name in clf.class_names_]))
    features = load_file(folder / "class_features.safetensors")["features"]
    torch.testing.assert_close(torch.nn.functional.normalize(texts, dim=-1), features, atol=1e-4, rtol=0)
    assert not torch.allclose(features, clf._trainer.network.zeroshot, atol=1e-4)


def _architecture(folder, path):
    path.write_text(json.dumps(json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]))
    return path


def test_peft_s_folder_is_what_was_learnt_and_loads_as_a_checkpoint(fit, photos, tmp_path):
    clf, folder = fit("CLIPLoRA", {"OPTIM.LR": 0.05}), tmp_path / "adapter"
    report = clf.export(folder, "peft", images=photos[0][::5])
    assert report.rows[-1].difference <= 1e-4
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "dlr_clip.json"
    }  # fmt: skip
    assert json.loads((folder / "dlr_clip.json").read_text())["classes"] == ["blue", "green", "red"]
    assert str(tmp_path) not in (folder / "adapter_config.json").read_text()
    learner = clf._trainer.network.learner
    learnt = {name: p.detach().clone() for name, p in learner.named_parameters()}
    assert any(p.abs().max() > 0 for name, p in learnt.items() if name.endswith("B"))
    for p in learner.parameters():
        p.data.zero_()
    clf._trainer.load_model(folder)
    assert all(torch.equal(p, learnt[name]) for name, p in learner.named_parameters())


def test_a_folder_that_is_there_and_other_methods_have_no_peft(probe, fit, tmp_path, capsys):
    assert main([str(probe[1]), "--format", "peft"]) == 2
    assert_one_line(capsys.readouterr().err, "LinearProbe", "onnx, torchscript", "no low-rank update")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(InputError, match="a new or an empty folder"):
        fit("CLIPLoRA").export(tmp_path / "there", "peft")


def test_other_methods_have_no_open_clip(probe, capsys):
    assert main([str(probe[1]), "--format", "openclip"]) == 2
    assert_one_line(capsys.readouterr().err, "LinearProbe", "onnx, torchscript", "more than a CLIP")


# ------------------------------------------------------------------------------------------------ what is in a file


@pytest.mark.skipif(OLD_TORCH, reason="needs torch 2.7")
def test_the_file_says_how_it_is_used_and_names_no_folder(probe, shallow, photos, tmp_path, capsys):
    clf, saved = probe
    file = tmp_path / "out" / "probe.onnx"
    images = str(Path(photos[0][0]).parents[1])
    argv = [str(saved), "--format", "onnx", "--half", "--int8", "--output", str(file), "--images", images]
    assert main([*argv, "--weights", str(shallow)]) == 0
    told = capsys.readouterr().out
    assert "accuracy %" in told and "18 images given" in told
    files = [file, file.with_name("probe.fp16.onnx"), file.with_name("probe.int8.onnx")]
    assert sorted(file.parent.iterdir()) == sorted(files)
    record = record_of(file)
    assert record["classes"] == ["blue", "green", "red"] and record["head"] == "probe"
    assert (record["temperature"], record["threshold"]) == (2.5, 0.4)
    assert record["preprocessing"]["size"] == [64, 64] and record["preprocessing"]["interpolation"] == "bicubic"
    assert record["input"] == {"name": "images", "shape": ["batch", 3, 64, 64], "type": "float32"}
    rows = record["measured"]["rows"]
    assert [row["name"] for row in rows] == ["PyTorch", *(path.name for path in files)]
    assert rows[0]["accuracy"] == rows[1]["accuracy"] == 100 * clf.score(*photos)
    assert max(rows[2]["size"], rows[3]["size"]) < rows[1]["size"]
    for path in files:
        content = path.read_bytes()
        assert not [word for word in (str(ROOT).encode(), b"site-packages", str(tmp_path).encode()) if word in content]
        found = run_onnx(path, inputs_of(clf, photos[0]))
        np.testing.assert_allclose(found, clf.predict_proba(photos[0]), atol=1e-4 if path == file else 0.05)


def test_pixels_may_come_in(probe, photos, tmp_path, monkeypatch):
    clf, _ = probe
    pixels = np.stack([np.asarray(Image.open(path).resize((64, 64))) for path in photos[0][:3]])
    expected = clf.predict_proba(list(pixels))
    monkeypatch.setattr(onnx_file, "EXPORTERS", ("torchscript",))
    clf.export(tmp_path / "probe.onnx", with_preprocessing=True, images=list(pixels))
    np.testing.assert_allclose(run_onnx(tmp_path / "probe.onnx", pixels), expected, atol=1e-4)
    assert record_of(tmp_path / "probe.onnx")["input"]["type"] == "uint8"


def test_the_same_command_gives_the_same_graph(probe, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "EXPORTERS", ("torchscript",))
    graphs = []
    for name in ("a", "b"):
        probe[0].export(tmp_path / f"{name}.onnx")
        graph = onnx.load(str(tmp_path / f"{name}.onnx")).graph
        graphs.append(graph.SerializeToString(deterministic=True))
    assert graphs[0] == graphs[1]


def test_a_run_is_exported_on_its_validation_images(tmp_path, shallow, capsys):
    run = tmp_path / "run"
    code = train(
        [
            *("--trainer", "TipAdapter", "--config", "tiny", "--output-dir", str(run), "--seed", "1"),
            *("DATASET.NUM_SHOTS", "2", "MODEL.BACKBONE.WEIGHTS", str(shallow), "USE_CUDA", "False"),
            *("TRAINER.TIPADAPTER.VIEWS", "0", "TRAINER.TIPADAPTER.PREC", "amp"),
        ]
    )
    assert code == 0
    capsys.readouterr()
    assert main([str(run), "--format", "torchscript"]) == 0
    told = capsys.readouterr().out
    assert "20 validation images of the run" in told and str(run / "model.pt") in told
    extra = {"dlr_clip.json": ""}
    loaded = torch.jit.load(str(run / "model.pt"), _extra_files=extra)
    assert loaded(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    record = json.loads(extra["dlr_clip.json"])
    assert record["classes"] == json.loads((run / "classes.json").read_text())
    assert record["measured"]["rows"][1]["accuracy"] is not None


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_a_file_that_differs_is_not_kept(probe, shallow, tmp_path, monkeypatch, capsys):
    saved = probe[1]
    file = tmp_path / "probe.pt"
    file.write_text("an older file")
    monkeypatch.setattr(exporting.Exported, "forward", _wrong(exporting.Exported.forward))
    with pytest.raises(ExportError, match=r"within 0.0001 of predict.py's but the largest difference is 0.\d+, on 3 "):
        probe[0].export(file, "torchscript")
    assert main([str(saved), "--format", "torchscript", "--weights", str(shallow), "--output", str(file)]) == 1
    assert_one_line(capsys.readouterr().err, "predict.py", "nothing is kept")
    assert [path.name for path in tmp_path.iterdir()] == ["probe.pt"] and file.read_text() == "an older file"


def _wrong(forward):
    return lambda self, images: (forward(self, images) + 0.01).clamp(max=1)


def test_a_graph_that_holds_a_number_of_images_is_not_kept(probe, tmp_path, monkeypatch):
    """torch.jit.trace's own check sees it; where it did not, the comparison would."""
    monkeypatch.setattr(exporting.Exported, "forward", _of_one_size(exporting.Exported.forward))
    with pytest.raises(ExportError, match="torch.jit.trace cannot export"):
        probe[0].export(tmp_path / "probe.pt", "torchscript")
    assert list(tmp_path.iterdir()) == []


def _of_one_size(forward):
    return lambda self, images: forward(self, images).reshape(len(images), -1)[: images.shape[0]].reshape(-1, 3)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{file}", "--format", "onx"], ["onx"]),
        (["/nowhere", "--format", "onnx"], ["a finished run", "/nowhere/config.yaml"]),
        (["{photo}", "--format", "onnx"], ["FewShotClassifier.save"]),
        (["{file}", "--format", "torchscript", "--half"], ["onnx with half", "torchscript"]),
        (["{file}", "--format", "torchscript", "--int8"], ["onnx with int8"]),
        (["{file}", "--format", "onnx", "--output", "{file}"], ["another file"]),
        (["{file}", "--format", "onnx", "--output", "{folder}"], ["is a folder"]),
        (["{file}", "--format", "onnx", "--output", "{photo}/a.onnx", "--weights", "{weights}"], ["Expected to write"]),
        (["{file}", "--format", "onnx", "--images", "/nowhere.png", "--weights", "{weights}"], ["none of 1"]),
        (["{file}", "--format", "onnx", "--images", "{empty}", "--weights", "{weights}"], ["images", "none"]),
        (["{file}", "--format", "onnx", "--weights", "/nowhere"], ["/nowhere"]),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(argv, words, probe, shallow, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"file": probe[1], "photo": photos[0][0], "weights": shallow, "folder": tmp_path}
    try:
        code = main([word.format(**places, empty=tmp_path / "empty") for word in argv])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    if words != ["onx"]:
        assert_one_line(capsys.readouterr().err, *words)


def test_a_package_that_is_missing_is_named(probe, monkeypatch, tmp_path):
    monkeypatch.setitem(forms.PACKAGES, "onnx", ("onnx", "no_such_package"))
    with pytest.raises(InputError, match=r"no_such_package is not installed: pip install .dlr-clip\[export\]."):
        probe[0].export(tmp_path / "probe.onnx")


def test_help_comes_without_torch():
    code = "import sys; from scripts.export import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--with-preprocessing" in done.stdout, done.stderr

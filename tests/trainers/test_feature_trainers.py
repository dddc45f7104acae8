"""Every trainer on features of the frozen CLIP, through configuration, engine, checkpoints and predict.py."""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import datasets
import trainers
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from dassl.engine import TRAINER_REGISTRY, build_trainer
from dassl.utils import read_image
from trainers.app import predict, prediction
from trainers.base import TransductiveTrainer
from trainers.base.feature_trainer import FeatureTrainer
from trainers.base.learner import pack_record, unpack_record
from trainers.linear_probe import fit_logistic

ROOT = Path(__file__).parents[2]
TRAINERS = [n for n in TRAINER_REGISTRY.registered_names() if issubclass(TRAINER_REGISTRY.get(n), FeatureTrainer)]
CONFIGS = {
    name: file.parent
    for file in (ROOT / "configs" / "trainers").glob("*/tiny.yaml")
    for name in TRAINERS
    if f"--trainer {name} " in file.read_text()
}
# Others refuse new classes.
ANY_CLASSES = {"ZeroshotCLIP", "ZeroshotCLIP2", "CLIPAdapter", "JCLIPAdapter", "GDA", "StatA", "RLA", "ProLIP"}
every = pytest.mark.parametrize("name", TRAINERS)


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch):
    """Digits with every 20th of its test images."""
    whole = DATASET_REGISTRY.get("Digits")

    class Digits(whole):
        def __init__(self, cfg):
            super().__init__(cfg)
            self._test = self._test[::20]

    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "Digits", Digits)


@pytest.fixture
def make_cfg(tmp_path, random_tiny, random_adapters):
    def make(name, *pairs, out="run", file="tiny"):
        cfg = get_cfg_default()
        datasets.extend_cfg(cfg)
        trainers.extend_cfg(cfg)
        cfg.merge_from_file(CONFIGS[name] / f"{file}.yaml")
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / out), "DATASET.NAME", "Digits", "DATASET.NUM_SHOTS", 2])
        cfg.merge_from_list(["MODEL.BACKBONE.WEIGHTS", str(random_tiny), "USE_CUDA", False, "SEED", 1])
        cfg.merge_from_list(["DATALOADER.TRAIN_X.BATCH_SIZE", 8, "DATALOADER.TEST.BATCH_SIZE", 30])
        cfg.merge_from_list(["OPTIM.MAX_EPOCH", 2, "TEST.NO_TEST", True])
        cfg.merge_from_list(["OPTIM.WARMUP_EPOCH", 0, "FEATURE_CACHE.USE", False])  # every run here encodes its images
        node = TRAINER_REGISTRY.get(name).node_name
        for key, value in (("VIEWS", 2), ("STEPS", 3), ("ITER_MM", 20)):
            if cfg.TRAINER[node].get(key, 0) > value:
                cfg.TRAINER[node][key] = value
        if TRAINER_REGISTRY.get(name).adapters == "needed":
            cfg.MODEL.IMO_WEIGHTS = str(random_adapters)
        cfg.merge_from_list(list(pairs))
        cfg.freeze()
        return cfg

    return make


@torch.no_grad()
def heads(trainer):
    trainer.set_model_mode("eval")
    features, _ = trainer.parse_batch_test(next(iter(trainer.test_loader)))
    return trainer.model_heads(features)


@every
def test_configs_merge_and_open_with_their_command(name):
    assert {file.stem for file in CONFIGS[name].glob("*.yaml")} >= {"vit_b16", "rn50", "tiny"}
    for file in CONFIGS[name].glob("*.yaml"):
        cfg = get_cfg_default()
        datasets.extend_cfg(cfg)
        trainers.extend_cfg(cfg)
        cfg.merge_from_file(file)
        assert cfg.TRAINER.NAME == name
        command = f"#   python train.py --trainer {name} --config-file {file.relative_to(ROOT).as_posix()}"
        assert command in file.read_text().split("\n\n")[0]


@every
def test_a_run_and_its_files(name, make, tmp_path):
    trainer = make(name, "TEST.NO_TEST", False)
    trainer.train()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["main"] == trainer.main_head
    assert "clip" in metrics["test"]["heads"]
    assert set(metrics["test"]["heads"]["clip"]) == {"accuracy", "top5", "macro_f1", "ece"}
    by_gradients = sum(p.numel() for p in trainer.network.learner.parameters() if p.requires_grad)
    assert metrics["params"]["trainable"] == by_gradients + getattr(trainer, "fitted_parameters", 0)
    assert metrics["params"]["total"] > 0
    for model in trainer.get_model_names():
        assert (tmp_path / "run" / model / f"model.pth.tar-{trainer.max_epoch}").is_file()
        assert metrics["timing"]["train_seconds"] > 0


@every
def test_zero_shot_head_is_clip_and_images_do_as_well_as_features(name, make):
    trainer = make(name)
    network = trainer.network
    batch = next(iter(trainer.test_loader.loader))
    plain = network.clip.encode_image(batch["img"])
    torch.testing.assert_close(network.learner.original(network.encode(batch["img"])), F.normalize(plain, dim=1))
    want = network.clip.logit_scale * F.normalize(plain, dim=-1) @ network.learner.zeroshot.t()
    for input in (batch["img"], network.encode(batch["img"])):
        torch.testing.assert_close(trainer.model_heads(input)["clip"], want, rtol=1e-4, atol=1e-3)


@every
def test_images_are_encoded_once(name, make, monkeypatch):
    trainer = make(name, "TEST.NO_TEST", False, "TEST.FINAL_MODEL", "best_val")
    seen, clip = [], trainer.network.clip
    for encode in (clip.encode_image, clip.pool_image):
        counted = functools.partial(lambda encode, images: seen.append(len(images)) or encode(images), encode)
        monkeypatch.setattr(clip, encode.__name__, counted)
    trainer.train()
    if trainer.get_model_names():
        trainer.test()
    dataset = trainer.dm.dataset
    views = max(1, trainer.views)
    assert 0 < sum(seen) <= views * len(dataset.train_x) + len(dataset.val) + len(dataset.test)


@every
def test_resuming_gives_the_uninterrupted_run(name, make, tmp_path):
    if not make(name).get_model_names():
        pytest.skip("learns nothing")
    whole = make(name, out="whole")
    whole.train()
    half = make(name, "TRAIN.CHECKPOINT_FREQ", 1, out="half")
    half.train()
    (tmp_path / "half" / half.model_name / "checkpoint").write_text("model.pth.tar-1\n")
    torch.manual_seed(5)
    again = make(name, out="half")
    again.train()
    for key, value in whole.network.learner.state_dict().items():
        torch.testing.assert_close(again.network.learner.state_dict()[key], value, equal_nan=True)
    assert again.selected == whole.selected


@every
def test_choices_do_not_see_test_labels(name, make, monkeypatch, tmp_path):
    """Poisoned test labels change nothing of what is trained or chosen."""
    runs = []
    for out, shift in (("clean", 0), ("poisoned", 3)):
        trainer = make(name, "TEST.NO_TEST", False, out=out)
        for item in trainer.dm.dataset.test:
            item._label = (item.label + shift) % 10
        trainer.train()
        runs.append((trainer.selected, trainer.network.learner.state_dict()))
    (first, state), (second, other) = runs
    assert first == second
    assert all(choice["on"] == "val" and choice["n"] == 20 for choice in first.values())
    for key in state:
        assert torch.equal(state[key].nan_to_num(), other[key].nan_to_num()), key


@every
def test_without_validation_images_the_defaults_are_used_and_named(name, make, monkeypatch):
    trainer = make(name, "TEST.FINAL_MODEL", "last_step")
    trainer.dm.dataset._val = None
    trainer.val_loader = None
    trainer.train()
    for choice in trainer.selected.values():
        assert "no validation set" in choice["on"]
        assert choice["n"] == (20 if "left out" in choice["on"] else 0)


@every
def test_new_classes_at_test_time(name, make, tmp_path):
    base = make(name, "DATASET.SUBSAMPLE_CLASSES", "base")
    base.train()
    new = make(name, "DATASET.SUBSAMPLE_CLASSES", "new", out="new")
    assert heads(new)[new.main_head].shape[1] == 5
    if not new.get_model_names():
        return
    if name not in ANY_CLASSES:
        with pytest.raises(ValueError, match="Expected classes that were trained on"):
            new.load_model(str(tmp_path / "run"))
        return
    before = heads(new)[new.main_head]
    new.load_model(str(tmp_path / "run"))
    assert not torch.equal(heads(new)[new.main_head], before)


@every
def test_predict(name, make, tmp_path):
    trainer = make(name)
    trainer.train()
    paths = [item.impath for item in trainer.dm.dataset.test[:3]]
    alone = not issubclass(type(trainer), TransductiveTrainer)  # others look at what else is in the batch
    expected = heads(trainer) if alone else None
    for classes in (None, "three,one"):
        args = SimpleNamespace(
            model_dir=str(tmp_path / "run"), load_epoch=None, classes=classes, cpu=True, debug=False, set=[],
            batch_size=None,
        )  # fmt: skip
        loaded, names = prediction.load_trainer(args)
        predictions, unreadable, head = predict.predict(
            prediction.Model(loaded, names), [(path, path) for path in paths]
        )
        assert (len(predictions), unreadable, head) == (3, {}, trainer.main_head)
        assert predictions[0].probabilities.shape == (len(names),)
        if classes is None and expected is not None:
            rows = torch.stack([p.probabilities for p in predictions])
            torch.testing.assert_close(rows, expected[head][:3].softmax(1), rtol=1e-3, atol=1e-5)


@every
def test_wrong_settings_are_named_before_anything_is_loaded(name, make_cfg):
    node = TRAINER_REGISTRY.get(name).node_name
    with pytest.raises(ValueError, match=f"TRAINER.{node}.PREC"):
        build_trainer(make_cfg(name, f"TRAINER.{node}.PREC", "int8"))


@pytest.mark.parametrize(("size", "steps"), [(8, 2), (20, 1), (21, 1), (256, 1)])
def test_an_epoch_of_clap_draws_whole_batches_of_one_view_from_all_views(make, size, steps):
    """max(1, floor(N / batch size)) batches for N = 20 images, from the features of all three views of them."""
    loader = make("CLAP", "TRAINER.CLAP.VIEWS", 3, "DATALOADER.TRAIN_X.BATCH_SIZE", size).train_loader_x
    known, drawn = loader.all(), set()
    for epoch in range(50):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert [len(batch["label"]) for batch in batches] == [min(size, 60)] * steps
        rows = []
        for batch in batches:
            for feature, image in zip(batch["feature"], batch["index"].tolist(), strict=True):
                (view,) = (known.values[:, image] == feature).all(dim=1).nonzero().flatten().tolist()
                rows.append((image, view))
        assert len(set(rows)) == len(rows)  # none twice within an epoch
        drawn.update(rows)
    assert len(drawn) == 60


def test_mirrored_views_of_the_cross_modal_probe(make, make_cfg):
    """Each image as it is at test time and its mirror image, as two examples; none mirrored where FLIP is off."""
    plain, trainer = make("CrossModalProbe"), make("CrossModalProbe", "TRAINER.CROSSMODAL.FLIP", True)
    known = trainer.train_loader_x.all()
    pixels = torch.stack([trainer.dm.test_loader.dataset.transform(read_image(path)) for path in known.paths])
    with torch.no_grad():
        for view, images in zip(known.values, (pixels, pixels.flip(-1)), strict=True):
            torch.testing.assert_close(view, F.normalize(trainer.network.clip.encode_image(images), dim=1))
    assert torch.equal(plain.train_loader_x.all().values, known.values[:1])
    assert len(trainer.train_loader_x.dataset) == 2 * len(plain.train_loader_x.dataset)
    batches = list(
        make("CrossModalProbe", "TRAINER.CROSSMODAL.FLIP", True, "TRAINER.CROSSMODAL.STEPS", 0).train_loader_x
    )
    assert len(batches) == 5 and sum(len(batch["label"]) for batch in batches) == 40
    with pytest.raises(ValueError, match="Expected TRAINER.CROSSMODAL.VIEWS to be 0 where .FLIP is True"):
        build_trainer(make_cfg("CrossModalProbe", "TRAINER.CROSSMODAL.FLIP", True, "TRAINER.CROSSMODAL.VIEWS", 2))
    cfg = get_cfg_default()
    datasets.extend_cfg(cfg)
    trainers.extend_cfg(cfg)
    cfg.merge_from_file(CONFIGS["CrossModalProbe"] / "vit_b16.yaml")
    assert cfg.TRAINER.CROSSMODAL.FLIP is True


def test_the_linear_probe_fits_raw_features(make):
    """The published penalty is on features as CLIP gives them; those of unit length are another fit."""
    fits = {}
    for kind in ("raw", "unit"):
        trainer = make("LinearProbe", "TRAINER.LINEARPROBE.FEATURES", kind, out=kind)
        trainer.train()
        known = trainer.train_features.all()
        pixels = torch.stack([trainer.dm.test_loader.dataset.transform(read_image(path)) for path in known.paths])
        with torch.no_grad():
            x = trainer.network.clip.encode_image(pixels)
        x = x if kind == "raw" else F.normalize(x, dim=1)
        torch.testing.assert_close(known.values[0], x, rtol=1e-4, atol=1e-5)
        c = trainer.selected["C"]["value"]
        weight, bias = fit_logistic(x, known.labels, 10, c)
        learner = trainer.network.learner
        torch.testing.assert_close(learner(known.values[0]), x @ weight.t() + bias, rtol=1e-2, atol=1e-2)
        zero = trainer.network.clip.logit_scale * F.normalize(x, dim=1) @ learner.zeroshot.t()
        torch.testing.assert_close(learner.clip_logits(known.values[0]), zero, rtol=1e-4, atol=1e-3)
        fits[kind] = learner.state_dict()
    raw, unit = make("LinearProbe"), make("LinearProbe", "TRAINER.LINEARPROBE.FEATURES", "unit")
    raw.load_model("", None)
    old = {name: value for name, value in fits["unit"].items() if name != "_extra_state"}
    record = unpack_record(fits["unit"]["_extra_state"])
    del record["facts"]["features"]  # as checkpoints were before raw features came
    raw.network.learner.take({**old, "_extra_state": pack_record(record)})
    unit.network.learner.take(fits["unit"])
    images = next(iter(raw.test_loader.loader))["img"]
    torch.testing.assert_close(raw.model_heads(images)["probe"], unit.model_heads(images)["probe"])
    with pytest.raises(ValueError, match="TRAINER.LINEARPROBE.FEATURES 'unit' but got 'raw'"):
        unit.network.learner.take(fits["raw"])


def test_the_rate_of_clip_adapter_changes_per_epoch(make):
    trainer = make("CLIPAdapter", "OPTIM.LR", 0.1, "OPTIM.MAX_EPOCH", 4)
    rates, step = [], trainer.model_update
    trainer.model_update = lambda *args: (rates.append(trainer.get_current_lr()), step(*args))
    trainer.train()
    want = [0.05 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4) for _ in range(2)]
    assert rates == pytest.approx(want)


@every
def test_a_list_of_templates(name, make):
    """The head clip is the mean over the templates, of raw features where the method's source averages those."""
    trainer = make(name, "DATASET.TEMPLATE", "['a {}', '{} texture.']")
    clip, names = trainer.network.clip, trainer.dm.dataset.classnames
    with torch.no_grad():
        rows = torch.stack([clip.encode_text([t.format(n) for n in names]) for t in ("a {}", "{} texture.")])
    raw = name in ("TaskRes", "CLAP", "CrossModalProbe")
    want = F.normalize((rows if raw else F.normalize(rows, dim=-1)).mean(0), dim=-1)
    torch.testing.assert_close(trainer.network.learner.zeroshot, want, rtol=1e-4, atol=1e-5)
    if raw and name != "CrossModalProbe":
        torch.testing.assert_close(trainer.network.learner.base, rows.mean(0), rtol=1e-4, atol=1e-5)

"""A whole run: its files, its TensorBoard events, the order of things, what it refuses."""

from __future__ import annotations

import io
import json
import math
import subprocess
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from dassl.engine import TRAINER_REGISTRY, HookBase, TrainerBase, TrainerX, build_trainer, environment
from dassl.engine.hooks.results import count_parameters
from dassl.evaluation import passes
from dassl.evaluation.mistakes import mistakes_of, mistakes_sheet
from dassl.evaluation.predictions import load_predictions
from dassl.modeling import BACKBONE_REGISTRY, Backbone
from dassl.utils import InputError, set_random_seed


def metrics_of(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_a_run_leaves_its_records(build, pictures, tmp_path):
    trainer = build("TwoHeads", "DATASET.NUM_SHOTS", 6)
    trainer.selected["beta"] = {"value": 0.5, "on": "val", "n": 6}
    trainer.train()
    run = tmp_path / "run"
    metrics = metrics_of(run)
    heads = metrics["test"]["heads"]
    assert list(heads) == ["before", "after"]
    assert all(list(values) == ["accuracy", "top5", "macro_f1", "ece"] for values in heads.values())
    assert heads["before"]["accuracy"] == pytest.approx(100 / 3)
    assert metrics["accuracy"] == heads["after"]["accuracy"] > 90
    assert metrics["test"]["n"] == 12
    assert (metrics["trainer"], metrics["dataset"], metrics["shots"], metrics["seed"]) == (
        "TwoHeads",
        "ToyColors",
        6,
        3,
    )
    assert metrics["selected"] == {"beta": {"value": 0.5, "on": "val", "n": 6}}
    assert metrics["params"] == {"trainable": 12, "total": 12}
    assert metrics["epochs"] == 3 and metrics["mode"] == "train"
    timing = metrics["timing"]
    assert set(timing) == {"train_seconds", "images_per_second", "data_seconds", "data_share", "test_seconds"}
    assert metrics["train"]["loss"] == trainer.stats.losses.meters["loss"].avg

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["OPTIM"]["LR"] == 0.1 and config["TRAINER"]["NAME"] == "TwoHeads"
    told = json.loads((run / "environment.json").read_text())
    assert told["packages"]["torch"] == torch.__version__ and "dassl" in told and "commit" in told
    assert json.loads((run / "DONE").read_text())["metrics"] == "metrics.json"
    assert (run / "DONE").stat().st_mtime_ns == max(p.stat().st_mtime_ns for p in run.iterdir() if p.is_file())


def test_the_commit_is_that_of_the_checkout_itself(tmp_path):
    """Not that of a repository in whose folder an environment lies, with the package installed."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@localhost"]
    for name in ("checkout", "environment"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    for command in (["init", "-q"], ["add", "checkout"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert environment._commit(tmp_path / "checkout") == {"commit": head, "modified": False}
    assert environment._commit(tmp_path / "environment") == {"commit": None, "modified": None}


def test_closing_lines(build, caplog, tmp_path):
    caplog.set_level("INFO")
    build("TwoHeads").train()
    lines = "\n".join(caplog.messages[-3:]).splitlines()
    assert lines[0].split() == ["head", "accuracy", "%", "top-5", "%", "macro", "F1", "%", "ECE", "%"]
    assert lines[2].split()[0] == "before" and lines[3].split()[:2] == ["after", "(main)"]
    assert lines[-2] == f"Output folder: {tmp_path / 'run'}"
    assert lines[-1] == f"Curves and pictures: tensorboard --logdir {tmp_path / 'run' / 'tensorboard'}"


def test_two_runs_are_equal(build, tmp_path):
    records = []
    for output in ("one", "two"):
        build("TwoHeads", output=output).train()
        metrics = metrics_of(tmp_path / output)
        records.append({key: metrics[key] for key in ("accuracy", "test", "train", "params")})
    assert records[0] == records[1]


def test_share_of_time_spent_waiting_for_data(build, tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = build("Linear", "OPTIM.MAX_EPOCH", 2)
    loader, step = trainer.train_loader_x, trainer.forward_backward

    def slow_batches():
        for batch in loader:
            time.sleep(0.06)
            yield (batch,)

    def slow_step(batch):
        time.sleep(0.02)
        return step(batch)

    trainer.train_batches, trainer.forward_backward = slow_batches, slow_step
    trainer.train()
    timing = metrics_of(tmp_path / "run")["timing"]
    steps = 2 * len(loader)
    assert 0.06 * steps <= timing["data_seconds"] <= timing["train_seconds"] - 0.02 * steps
    assert timing["data_share"] == timing["data_seconds"] / timing["train_seconds"]
    shares = events(tmp_path / "run").Scalars("train/data_share")
    assert [event.step for event in shares] == [len(loader) - 1, steps - 1]
    assert all(0 < event.value < 1 for event in shares)
    (line,) = [message for message in caplog.messages if message.startswith("Waiting for data: ")]
    assert line.endswith(f"({100 * timing['data_share']:.0f}%)")


def events(folder) -> EventAccumulator:
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    reader.Reload()
    return reader


def test_tensorboard_reads_everything_back(build, pictures, tmp_path):
    trainer = build("TwoHeads", "TEST.FINAL_MODEL", "best_val")
    trainer.train()
    reader = events(tmp_path / "run")
    tags = set(reader.Tags()["scalars"])
    assert {"train/loss", "train/lr", "train/images_per_second"} <= tags
    done = "when_done/test"
    assert {f"{done}/accuracy", f"{done}/error_rate", f"{done}/macro_f1", "val/accuracy"} <= tags
    assert max(tags - {tag for tag in tags if tag.startswith(done)}) < done  # curves come first
    assert {
        f"{done}/{head}/{m}" for head in ("before", "after") for m in ("accuracy", "top5", "macro_f1", "ece")
    } <= tags
    assert [event.step for event in reader.Scalars("train/loss")] == list(range(12))
    rates = [event.value for event in reader.Scalars("train/lr")]
    assert rates == pytest.approx([0.1] * 4 + [0.075] * 4 + [0.025] * 4)  # the rate each step used
    assert [event.step for event in reader.Scalars("val/accuracy")] == [0, 1, 2]
    (accuracy,) = reader.Scalars(f"{done}/after/accuracy")
    assert accuracy.step == 2 and accuracy.value == pytest.approx(metrics_of(tmp_path / "run")["accuracy"])
    assert set(reader.Tags()["images"]) == {
        f"{done}/confusion_matrix",
        f"{done}/examples",
    }  # and no mistakes: there are none
    image = reader.Images(f"{done}/examples")[0]
    assert image.width > 300 and image.height > 300 and image.encoded_image_string.startswith(b"\x89PNG")
    assert len(trainer.evaluation.examples) == 8 and {e.label for e in trainer.evaluation.examples} == {0, 1, 2}

    hparams = reader.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(hparams).session_start_info.hparams
    shown = reader.summary_metadata["_hparams_/experiment"].plugin_data.content
    names = {info.name.tag for info in plugin_data_pb2.HParamsPluginData.FromString(shown).experiment.metric_infos}
    assert names == {f"{done}/before/accuracy", f"{done}/after/accuracy"} <= tags
    assert start["OPTIM.LR"].number_value == 0.1 and start["DATASET.NAME"].string_value == "ToyColors"
    assert [p for p in (tmp_path / "run" / "tensorboard").iterdir() if p.is_dir()] == []


def test_file_and_tensorboard_have_the_same_sheet_of_mistakes(build, pictures, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(passes, "mistakes_sheet", lambda found: drawn.append(1) or mistakes_sheet(found))
    trainer = build("ZeroShot")
    trainer.scale = -5.0  # the least likely class is taken
    trainer.train()
    (shown,) = events(tmp_path / "run").Images("when_done/test/mistakes")
    assert shown.encoded_image_string == (tmp_path / "run" / "mistakes.png").read_bytes() and drawn == [1]
    image = Image.open(io.BytesIO(shown.encoded_image_string))
    assert (image.width, image.height) == (shown.width, shown.height) and image.mode == "RGB"
    found = mistakes_of(load_predictions(tmp_path / "run" / "predictions.safetensors"))
    assert np.array_equal(np.asarray(image), mistakes_sheet(found))


def test_best_model_on_validation_is_deployed(build, tmp_path, monkeypatch):
    trainer = build("Linear", "TEST.FINAL_MODEL", "best_val", "OPTIM.MAX_EPOCH", 4)
    results = iter([40.0, 60.0, 60.0, 50.0])
    really_test, weights = trainer.test, []

    def fake_test(split=None):
        if split != "val":
            return really_test(split)
        weights.append(trainer.net.weight.detach().clone())
        return next(results)

    monkeypatch.setattr(trainer, "test", fake_test)
    trainer.train()
    assert torch.equal(trainer.net.weight, weights[1])  # strictly better only: not the third
    best = torch.load(tmp_path / "run" / "net" / "model-best.pth.tar", weights_only=True)
    assert best["epoch"] == 2 and best["val_result"] == 60.0
    assert (tmp_path / "run" / "net" / "checkpoint").read_text() == "model.pth.tar-4\n"
    assert metrics_of(tmp_path / "run")["selected"]["epoch"]["value"] == 2


def test_without_a_validation_set_nothing_stands_in_for_it(build):
    trainer = build(root="empty_val")
    with pytest.raises(InputError, match=r'Expected a val set for test\("val"\)'):
        trainer.test("val")
    with pytest.raises(InputError, match="Expected a val set for TEST.SPLIT val"):
        build("Linear", "TEST.SPLIT", "val", root="empty_val")
    with pytest.raises(InputError, match="Expected a val set for TEST.FINAL_MODEL best_val"):
        build("Linear", "TEST.FINAL_MODEL", "best_val", root="empty_val").train()


def test_validation_results_are_not_called_test(build, tmp_path):
    build("Linear", "TEST.SPLIT", "val").train()
    metrics = metrics_of(tmp_path / "run")
    assert metrics["split"] == "val" and metrics["val"]["n"] == 6 and "test" not in metrics


def test_no_test(build, tmp_path):
    build("Linear", "TEST.NO_TEST", True).train()
    metrics = metrics_of(tmp_path / "run")
    assert metrics["accuracy"] is None and metrics["test"]["heads"] == {} and (tmp_path / "run" / "DONE").exists()


def test_a_method_that_learns_nothing_is_only_tested(build, tmp_path):
    build("ZeroShot").train()
    metrics = metrics_of(tmp_path / "run")
    assert metrics["accuracy"] > 90 and metrics["epochs"] == 0 and metrics["params"] == {"trainable": 0, "total": 0}


def test_evaluation_only_writes_a_record_of_its_own(build, tmp_path):
    build("ZeroShot", output="zero").test()
    metrics = metrics_of(tmp_path / "zero")
    assert metrics["mode"] == "eval" and metrics["accuracy"] > 90 and (tmp_path / "zero" / "DONE").exists()
    assert not (tmp_path / "zero" / "tensorboard").exists()


def test_evaluation_only_leaves_a_training_run_alone(build, tmp_path):
    build().train()
    run = tmp_path / "run"
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    build().test()
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.name in before} == before
    assert json.loads((run / "metrics-eval.json").read_text())["mode"] == "eval"


def test_a_run_that_dies_has_no_marker(build, tmp_path, monkeypatch):
    build().train()
    assert (tmp_path / "run" / "DONE").exists()
    trainer = build("Linear", "OPTIM.MAX_EPOCH", 4, "TRAIN.FORCE_RESUME", True)
    monkeypatch.setattr(trainer, "forward_backward", lambda batch: {"loss": math.nan})
    with pytest.raises(FloatingPointError, match=r"but it is not, at step 13, epoch \[4/4\] batch \[1/4\]"):
        trainer.train()
    assert not (tmp_path / "run" / "DONE").exists() and trainer.writer is None and trainer.phase == "idle"


def test_loss_is_checked_before_the_step(build):
    trainer = build()
    trainer.epoch, trainer.batch_idx, trainer.max_epoch, trainer.num_batches = 1, 2, 3, 4
    weight = trainer.net.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=r"got \[inf\] at epoch \[2/3\] batch \[3/4\]"):
        trainer.model_backward_and_update(trainer.net.weight.square().sum() * math.inf)
    assert torch.equal(trainer.net.weight, weight)


def test_dry_run_saves_nothing(build, tmp_path, caplog):
    caplog.set_level("INFO")
    build("TwoHeads").dry_run()
    assert caplog.messages[-1] == "Dry run: OK" and "before, after" in caplog.messages[-2]
    build("ZeroShot").dry_run()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count, steps", [("train_x", 4), ("train_u", 1), ("smaller_one", 1)])
def test_unlabeled_batches(build, count, steps):
    trainer = build("Unlabeled", "TRAIN.COUNT_ITER", count, "OPTIM.MAX_EPOCH", 1)
    trainer.train()
    assert trainer.seen == [(4, 4)] * steps


@pytest.mark.parametrize(
    "key, value",
    [
        ("TEST.FINAL_MODEL", "best"),
        ("TEST.SPLIT", "train"),
        ("TRAIN.COUNT_ITER", "both"),
        ("TRAIN.PRINT_FREQ", 0),
        ("OPTIM.MAX_EPOCH", -1),
        ("OUTPUT_DIR", ""),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_built(build, key, value):
    with pytest.raises(InputError, match=f"Expected {key} to be"):
        build("Linear", key, value)


def test_unknown_trainer(build):
    with pytest.raises(InputError, match='got "Linaer" \\(did you mean "Linear"'):
        build("Linaer")


def test_events_come_in_order_even_when_a_trainer_overrides_its_methods(build, monkeypatch):
    trainer = build("Linear", "OPTIM.MAX_EPOCH", 1, "DATALOADER.TRAIN_X.BATCH_SIZE", 18)
    seen = []

    class Recorder(HookBase):
        def __getattribute__(self, name):
            if name.startswith(("start", "before", "after", "finish", "close")):
                seen.append(name)
            return super().__getattribute__(name)

    trainer.register_hooks([Recorder()])
    monkeypatch.setattr(trainer, "before_epoch", lambda: seen.append("own before_epoch"))
    monkeypatch.setattr(trainer, "after_epoch", lambda: seen.append("own after_epoch"))
    trainer.train()
    assert seen == [
        "start",
        "before_train",
        "before_epoch",
        "own before_epoch",
        "before_step",
        "after_step",
        "own after_epoch",
        "after_test",  # the final test is itself a hook's doing
        "after_train",
        "finish",
        "close",
    ]


def test_a_trainer_with_its_own_test_is_recorded(build, monkeypatch, tmp_path):
    trainer = build()
    monkeypatch.setattr(trainer, "test", lambda split=None: 12.5)
    trainer.train()
    metrics = metrics_of(tmp_path / "run")
    assert metrics["accuracy"] == 12.5 and metrics["test"]["heads"] == {"main": {"accuracy": 12.5}}


def test_registration_of_models():
    trainer = TrainerBase()
    model = torch.nn.Linear(1, 1)
    optim = torch.optim.SGD(model.parameters(), lr=0.5)
    assert trainer.get_current_lr() == 0.0
    trainer.register_model("a", model, optim)
    trainer.register_model("b", torch.nn.Dropout())
    assert trainer.get_model_names() == ["a", "b"] and trainer.get_model_names("b") == ["b"]
    assert trainer.get_current_lr() == 0.5
    trainer.set_model_mode("test", "b")
    assert not trainer._models["b"].training and model.training
    with pytest.raises(ValueError, match='a new model name but got "a"'):
        trainer.register_model("a", model)
    with pytest.raises(KeyError, match='got "c"'):
        trainer.get_model_names(["a", "c"])
    with pytest.raises(KeyError, match="mode"):
        trainer.set_model_mode("training")

    class Early(TrainerBase):
        def __init__(self):
            self.register_model("a", model)

    with pytest.raises(AttributeError, match="super"):
        Early()


def test_the_default_model_trains(build, monkeypatch, tmp_path):
    class MeanColor(Backbone):
        def __init__(self, pretrained):
            super().__init__()
            self._out_features = 3

        def forward(self, x):
            return x.mean(dim=(2, 3))

    class Default(TrainerX):
        def forward_backward(self, batch):
            image, label, _ = self.parse_batch_train(batch)
            loss = torch.nn.functional.cross_entropy(self.model(image), label)
            self.model_backward_and_update(loss)
            return {"loss": loss}  # a tensor will do as well

    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "MeanColor", MeanColor)
    monkeypatch.setitem(TRAINER_REGISTRY._obj_map, "Default", Default)
    build("Default", "MODEL.BACKBONE.NAME", "MeanColor").train()
    assert metrics_of(tmp_path / "run")["backbone"] == "MeanColor"
    assert (tmp_path / "run" / "model" / "model.pth.tar-3").is_file()


def test_counts_parameters_hidden_from_the_state_dict(build):
    trainer = build()
    trainer.net.frozen = [torch.nn.Linear(5, 4).requires_grad_(False)]
    assert count_parameters(trainer) == {"trainable": 12, "total": 36}


def test_data_may_come_from_outside(build, make_cfg, monkeypatch):
    """A trainer that is given its data makes none of its own."""
    expected = build("TwoHeads")
    data = build("TwoHeads", output="other").dm
    monkeypatch.delattr("dassl.engine.trainer.DataManager")
    set_random_seed(3)
    trainer = build_trainer(make_cfg("TwoHeads", output="given", root="nowhere"), data)
    assert trainer.dm is data and trainer.train_loader_x is data.train_loader_x
    assert trainer.lab2cname == data.lab2cname and trainer.num_classes == data.num_classes
    expected.train()
    trainer.train()
    assert trainer.best_result == expected.best_result
    assert all(torch.equal(a, b) for a, b in zip(expected.net.parameters(), trainer.net.parameters(), strict=True))


def test_a_trainer_that_takes_a_configuration_only_is_built_of_it(make_cfg, monkeypatch):
    class Own(TRAINER_REGISTRY.get("Linear")):
        def __init__(self, cfg):  # as in upstream
            super().__init__(cfg)

    monkeypatch.setitem(TRAINER_REGISTRY._obj_map, "Own", Own)
    assert build_trainer(make_cfg("Own")).dm is not None

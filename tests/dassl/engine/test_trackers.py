"""LOGGER wandb and mlflow: the real packages, without a network, read back by their own readers."""

from __future__ import annotations

import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dassl.engine import trackers
from dassl.utils import InputError


def tensorboard_scalars(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: {one.step: one.value for one in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_mlflow_has_what_tensorboard_has(build, tmp_path, monkeypatch, pictures):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    build("TwoHeads", "LOGGER", "mlflow").train()
    folder = tmp_path / "run"
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    run = client.get_run((folder / trackers.RUN_FILE).read_text())
    assert run.info.status == "FINISHED" and run.data.params["OPTIM.LR"] == "0.1"
    for tag, values in tensorboard_scalars(folder).items():
        ours = {one.step: one.value for one in client.get_metric_history(run.info.run_id, tag)}
        assert ours == pytest.approx(values, rel=1e-5), tag
    assert any(file.path.endswith(".png") for file in client.list_artifacts(run.info.run_id))


def test_mlflow_goes_on_with_a_resumed_run(build, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    build("Linear", "LOGGER", "mlflow", "OPTIM.MAX_EPOCH", 1, "TRAIN.FORCE_RESUME", True).train()
    first = (tmp_path / "run" / trackers.RUN_FILE).read_text()
    build("Linear", "LOGGER", "mlflow", "TRAIN.FORCE_RESUME", True).train()
    assert (tmp_path / "run" / trackers.RUN_FILE).read_text() == first
    client = MlflowClient(f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    steps = {one.step for one in client.get_metric_history(first, "train/lr")}
    assert len(steps) == 12  # three epochs of four steps


def log_records(content):
    """Yield the records of a file in LevelDB's log format, which wandb's offline files have after seven bytes."""
    block, place, parts = 32_768, 7, []
    while place + 7 <= len(content):
        if block - place % block < 7:  # the rest of a block that has no room for a header
            place += block - place % block
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield b"".join(parts)
            parts = []


def wandb_history(folder):
    """Return the rows of a run that was kept offline."""
    from wandb.proto import wandb_internal_pb2

    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    rows = []
    for data in log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            names = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append({name: json.loads(value) for name, value in names.items()})
    return rows


def test_wandb_has_what_tensorboard_has(build, tmp_path, monkeypatch, pictures):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    build("TwoHeads", "LOGGER", "wandb").train()
    rows = wandb_history(tmp_path / "run")
    for tag, values in tensorboard_scalars(tmp_path / "run").items():
        ours = {row["step"]: row[tag] for row in rows if tag in row}
        assert ours == pytest.approx(values, rel=1e-5), tag
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/**/*.png"))


@pytest.mark.parametrize("name", ["none", "Tensorboard", ""])
def test_other_names_are_refused(build, name):
    with pytest.raises(InputError, match="Expected LOGGER to be one of tensorboard, wandb, mlflow"):
        build("Linear", "LOGGER", name)


def test_a_package_that_is_not_there_is_named(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        build("Linear", "LOGGER", "wandb")


def test_a_tracker_that_fails_does_not_end_the_run(build, tmp_path, monkeypatch, caplog):
    class Failing:
        def __init__(self, folder):
            self.calls = 0

        def scalar(self, *args):
            self.calls += 1
            raise ConnectionError("the server is gone\nmuch more")

        image = settings = close = scalar

    monkeypatch.setattr(trackers, "MLflowTracker", Failing)
    monkeypatch.setattr(trackers, "check_logger", lambda name: None)
    monkeypatch.setattr("dassl.engine.trainer.check_logger", lambda name: None)
    build("Linear", "LOGGER", "mlflow").train()
    told = [record.getMessage() for record in caplog.records if "LOGGER mlflow" in record.getMessage()]
    assert told == ["LOGGER mlflow: its curves end here: the server is gone"]
    assert tensorboard_scalars(tmp_path / "run")

    def broken(folder):
        raise OSError("no login")

    monkeypatch.setattr(trackers, "MLflowTracker", broken)
    build("Linear", "LOGGER", "mlflow", output="other").train()
    assert "no login" in caplog.text and (tmp_path / "other" / "DONE").exists()

"""The file that figures are drawn from: its content, its size, and when a run writes it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dassl.engine import TRAINER_REGISTRY
from dassl.evaluation.predictions import FEATURE_IMAGES, Recorder, load_predictions, save_predictions
from dassl.utils import InputError

NAMES = {0: "<b>", 1: 'a "quoted"\nname', 2: "ß", 3: "3", 4: "4", 5: "5"}


def record(limit: int = 10**7, n: int = 50, classes: int = 6, width: int = 4, per_batch: int = 7, seed: int = 1):
    """(predictions, logits by head, labels, features) of random logits with ties."""
    generator = torch.Generator().manual_seed(0)
    heads = {name: torch.randint(-3, 4, (n, classes), generator=generator).float() for name in ("clip", "final")}
    labels = torch.randint(0, classes, (n,), generator=generator)
    features = torch.randn(n, width, generator=generator)
    recorder = Recorder(n, limit, seed)
    for start in range(0, n, per_batch):
        part = slice(start, start + per_batch)
        paths = [f"/data/images/{i}/ü{i}.png" for i in range(n)][part]
        recorder.tell(paths, {"alpha": features[part, :1]}, {"cma": features[part]})
        recorder.add({name: logits[part].to(torch.bfloat16) for name, logits in heads.items()}, labels[part])
    return recorder.finish("test", "final", "clip", NAMES), heads, labels, features


def test_numbers_are_those_of_a_naive_count() -> None:
    predictions, heads, labels, features = record()
    assert predictions is not None and predictions.heads == ["clip", "final"]
    assert predictions.classnames == list(NAMES.values())
    for head, logits in heads.items():
        row = predictions.head(head)
        confusion = np.zeros((6, 6), int)
        for i, (values, label) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True)):
            guess = values.index(max(values))
            confusion[label, guess] += 1
            assert predictions.top[row, i, 0] == guess
            assert sorted(values, reverse=True)[:5] == [values[k] for k in predictions.top[row, i]]
            assert predictions.true[row, i] == values[label]
            assert predictions.rival[row, i] == max(v for k, v in enumerate(values) if k != label)
            assert predictions.logsumexp[row, i] == pytest.approx(np.log(np.exp(values).sum()), abs=1e-5)
        assert np.array_equal(predictions.confusion(head), confusion)
        assert predictions.correct(head).sum() == confusion.trace()
        assert predictions.logits is not None and np.array_equal(predictions.logits[row], logits.numpy())
    assert np.array_equal(predictions.rows, np.arange(50))
    assert np.allclose(predictions.features["cma"], features, atol=2e-3)
    assert np.array_equal(predictions.values["alpha"], features[:, 0].numpy())
    with pytest.raises(InputError, match="Expected a head out of clip, final"):
        predictions.head("glr")


def test_a_file_gives_back_what_was_saved_and_is_the_same_each_time(tmp_path) -> None:
    first, second = record()[0], record()[0]
    save_predictions(tmp_path / "run" / "predictions.safetensors", first)
    save_predictions(tmp_path / "again.safetensors", second)
    raw = (tmp_path / "run" / "predictions.safetensors").read_bytes()
    assert raw == (tmp_path / "again.safetensors").read_bytes() and b"/data/images/0" not in raw
    loaded = load_predictions(tmp_path / "run")
    for name, value in vars(first).items():
        found = getattr(loaded, name)
        if isinstance(value, dict):
            assert value.keys() == found.keys() and all(np.array_equal(value[k], found[k]) for k in value)
        else:
            assert np.array_equal(value, found) if isinstance(value, np.ndarray) else value == found, name
    assert loaded.paths is not None and loaded.paths[3] == "/data/images/3/ü3.png"


def test_what_does_not_fit_is_left_out_in_order(caplog) -> None:
    whole = record()[0]
    assert whole is not None and whole.logits is not None
    kept = []
    for limit in range(7000, 0, -50):
        predictions = record(limit)[0]
        kept.append(
            "nothing"
            if predictions is None
            else "".join(
                letter
                for letter, there in (
                    ("l", predictions.logits is not None),
                    ("p", predictions.paths is not None),
                    ("f", bool(predictions.features)),
                )
                if there
            )
        )
    assert list(dict.fromkeys(kept)) == ["lpf", "pf", "f", "", "nothing"]
    assert "more than TEST.PREDICTIONS_MB" in caplog.text


def test_features_are_of_a_seeded_part_of_classes_and_images() -> None:
    def rows(seed: int) -> np.ndarray:
        predictions = record(10**9, n=6000, classes=60, per_batch=1000, seed=seed)[0]
        assert predictions is not None and len(predictions.features["cma"]) == len(predictions.rows)
        assert len(np.unique(predictions.labels[predictions.rows])) == 20
        return predictions.rows

    one, again, two = rows(1), rows(1), rows(2)
    assert np.array_equal(one, again) and not np.array_equal(one, two)
    predictions, _, _, features = record(10**9, n=6000, classes=6, per_batch=1000)
    assert predictions is not None and len(predictions.rows) == FEATURE_IMAGES
    assert np.allclose(predictions.features["cma"], features[torch.from_numpy(predictions.rows).long()], atol=4e-3)


def test_many_classes_take_little() -> None:
    recorder = Recorder(50_000, 20_000_000)
    heads = {name: torch.randn(100, 1000) for name in "abcde"}
    recorder.tell(["/x"] * 100)
    recorder.add(heads, torch.zeros(100, dtype=torch.long))
    predictions = recorder.finish("test", "a", "", {})
    assert predictions is not None and predictions.logits is None and predictions.classnames[999] == "999"
    per_image = sum(getattr(predictions, name).nbytes for name in ("labels", "top", "true", "rival", "logsumexp")) / 100
    assert per_image * 50_000 < 6_000_000


def test_two_processes_record_what_one_does(tmp_path) -> None:
    worker = [sys.executable, str(Path(__file__).parents[2] / "helpers" / "predictions_worker.py"), str(tmp_path)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**job, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    running = [subprocess.Popen(worker, env={**os.environ, **more}) for more in ({}, *ranks)]
    assert [process.wait() for process in running] == [0, 0, 0]
    one, first, second = ((tmp_path / name).read_bytes() for name in ("0-of-1", "0-of-2", "1-of-2"))
    assert one == first == second
    alone = load_predictions(tmp_path / "0-of-1")
    assert len(alone.labels) == len(alone.rows) == len(alone.paths or ()) == 23


def test_something_else_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="but there is none: a run writes it"):
        load_predictions(tmp_path)
    (tmp_path / "predictions.safetensors").write_bytes(b"not one")
    with pytest.raises(InputError, match="to be the predictions of a run but got something else"):
        load_predictions(tmp_path)


def test_a_run_leaves_its_last_test(build, tmp_path) -> None:
    build("TwoHeads").train()
    run = tmp_path / "run"
    predictions, metrics = load_predictions(run), json.loads((run / "metrics.json").read_text())
    assert (predictions.main, predictions.reference, predictions.split) == ("after", "before", "test")
    for head, values in metrics["test"]["heads"].items():
        assert 100 * predictions.correct(head).mean() == pytest.approx(values["accuracy"])
    assert predictions.classnames == ["red", "green", "blue"] and len(predictions.paths or ()) == 12
    assert (run / "DONE").stat().st_mtime_ns >= (run / "predictions.safetensors").stat().st_mtime_ns
    before = (run / "predictions.safetensors").read_bytes()
    trainer = build("TwoHeads")
    trainer.load_model(str(run), epoch=trainer.max_epoch)
    trainer.test("val")
    assert load_predictions(run / "predictions-eval.safetensors").split == "val"
    assert (run / "predictions.safetensors").read_bytes() == before


def test_a_method_may_tell_more(build, tmp_path, monkeypatch) -> None:
    class Telling(TRAINER_REGISTRY.get("TwoHeads")):  # type: ignore[misc]  # known by its name only
        def model_report(self, input):
            features = input.mean(dim=(2, 3))
            return {"heads": self.model_heads(input), "values": {"alpha": features[:, 0]}, "features": {"x": features}}

    monkeypatch.setitem(TRAINER_REGISTRY._obj_map, "Telling", Telling)
    build("Telling").test()
    predictions = load_predictions(tmp_path / "run")
    assert predictions.features["x"].shape == (12, 3)
    assert np.allclose(predictions.values["alpha"], predictions.features["x"][:, 0], atol=1e-3)


def test_it_can_be_switched_off_and_an_old_file_does_not_stay(build, tmp_path) -> None:
    build("ZeroShot").test()
    assert (tmp_path / "run" / "predictions.safetensors").is_file()
    build("ZeroShot", "TEST.PREDICTIONS_MB", 0).test()
    assert not (tmp_path / "run" / "predictions.safetensors").exists()
    with pytest.raises(InputError, match="Expected TEST.PREDICTIONS_MB to be at least 0 but got -1"):
        build("ZeroShot", "TEST.PREDICTIONS_MB", -1)

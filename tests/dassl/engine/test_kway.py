"""A test set that has part of the classes trained on is evaluated both ways; the class names are kept with a run."""

from __future__ import annotations

import json

import pytest
import torch

from dassl.data.datasets import DATASET_REGISTRY
from dassl.engine import TRAINER_REGISTRY, TrainerX
from dassl.utils import InputError

INDICES = [4, 1, 2]  # of red, green, blue among the five classes trained on


class Cut(TrainerX):
    """Knows five classes. As new classes it tells the colors apart; its trained classifier mistakes green for blue."""

    def build_model(self):
        self.columns = None
        self.bound = []

    def bind_classes(self, names, indices):
        self.bound.append(indices)
        part = indices is not None and len(indices) < 5
        self.columns = torch.tensor(indices) if part else None
        return part

    def model_heads(self, input):
        mean = input.mean(dim=(2, 3))  # [B, 3]: red, green, blue
        if self.columns is None:
            return {"other": -mean, "main": mean}
        red, green, blue = mean.T
        wide = torch.stack([red + 9, green, blue + green.clamp(min=0) * 2, red + 9, red], dim=1)
        return {"other": -wide[:, self.columns], "main": wide[:, self.columns]}

    main_head = "main"


@pytest.fixture
def shifted(monkeypatch, build):
    def shifted(indices):
        base = DATASET_REGISTRY.get("ToyColors")

        def init(self, cfg):
            base.__init__(self, cfg)
            if indices is not None:
                self.class_indices = indices

        monkeypatch.setitem(DATASET_REGISTRY._obj_map, "Shifted", type("Shifted", (base,), {"__init__": init}))
        monkeypatch.setitem(TRAINER_REGISTRY._obj_map, "Cut", Cut)
        return build("Cut", "DATASET.NAME", "Shifted")

    return shifted


def test_both_results_are_reported(shifted, tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = shifted(INDICES)
    trainer.bind_classes([], INDICES)
    result = trainer.test()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result == metrics["accuracy"] == metrics["test"]["heads"]["main"]["accuracy"] == pytest.approx(200 / 3)
    assert metrics["test"]["heads_kway"]["main"]["accuracy"] == 100
    assert list(metrics["test"]["heads_kway"]) == ["other", "main"]
    assert trainer.bound[-1] == INDICES  # left as it was found
    assert "These 3 classes taken as new ones:" in caplog.text


@pytest.mark.parametrize("indices", [None, [0, 1, 2, 3, 4]])
def test_other_datasets_have_one_result(shifted, tmp_path, indices):
    shifted(indices).test()
    assert "heads_kway" not in json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]


def test_a_run_does_not_go_on_with_other_classes(build, tmp_path):
    build("Linear").train()
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*") if path.is_file()}
    trainer = build("Linear")
    trainer.lab2cname = {0: "red", 1: "green", 2: "yellow"}
    with pytest.raises(InputError, match="3 classes it has been trained on.*some differ"):
        trainer.train()
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*") if path.is_file()} == before


def test_class_names_are_kept(build, tmp_path):
    build("ZeroShot").test()
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == ["red", "green", "blue"]

"""Datum, DatasetBase, registry of datasets."""

from __future__ import annotations

import os
import pickle
import random
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum, build_dataset
from dassl.utils import InputError


class InMemory(DatasetBase):
    check_files = False
    domains = ["photo", "sketch"]


def item(label, name=None, path="x.png", domain=0):
    return Datum(impath=path, label=label, domain=domain, classname=f"c{label}" if name is None else name)


def items(*labels):
    return [item(label, path=f"{label}_{number}.png") for number, label in enumerate(labels)]


def test_datum():
    datum = Datum("a.png", np.int64(3), 1, "cat")
    assert (datum.impath, datum.label, datum.domain, datum.classname) == ("a.png", 3, 1, "cat")
    assert type(datum.label) is int
    assert Datum(impath=Path("a.png"), label=3, domain=1, classname="cat") == datum
    assert len({datum, Datum("a.png", 3, 1, "cat"), Datum("a.png", 4, 1, "cat")}) == 2
    assert eval(repr(datum)) == datum == pickle.loads(pickle.dumps(datum))
    assert Datum.__module__ == "dassl.data.datasets.base_dataset"  # pickles of upstream's readers name it
    with pytest.raises(AttributeError):
        datum.label = 1


@pytest.mark.parametrize("values", [{"impath": 3}, {"label": "1"}, {"label": 1.0}, {"domain": None}, {"classname": 3}])
def test_datum_checks_types(values):
    with pytest.raises(InputError, match=f"Expected {next(iter(values))} to be"):
        Datum(**values)


def test_properties():
    train, val, test = [item(1, "b"), item(0, "a"), item(1, "b")], [item(0, "a")], [item(1, "b")]
    dataset = InMemory(train_x=train, val=val, test=test)
    assert dataset.train_x is train and dataset.val is val and dataset.test is test and dataset.train_u is None
    assert dataset.num_classes == 2
    assert dataset.lab2cname == {0: "a", 1: "b"} and dataset.classnames == ["a", "b"]


@pytest.mark.parametrize(
    "lists, told",
    [
        ({}, "to have training items"),
        ({"train_x": []}, "to have training items"),
        ({"train_x": items(0, 2)}, "without a gap"),
        ({"train_x": items(-1, 0)}, "without a gap"),
        ({"train_x": [item(0, "a"), item(0, "b")]}, "to have one name"),
        ({"train_x": items(0, 1), "test": items(0, 2)}, "test labels"),
        ({"train_x": items(0, 1), "val": items(5)}, "val labels"),
    ],
)
def test_wrong_lists(lists, told):
    with pytest.raises(InputError, match=told):
        InMemory(**lists)


def test_unlabeled_test_items_may_be_there():
    assert InMemory(train_x=items(0), test=[item(-1, "")]).num_classes == 1


def test_missing_files_are_one_error(tmp_path, monkeypatch):
    there = [tmp_path / "a" / f"{i}.png" for i in range(3)]
    for path in there:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    gone = [tmp_path / "a" / f"gone{i}.png" for i in range(4)] + [tmp_path / "nofolder" / f"{i}.png" for i in range(3)]
    calls = []
    monkeypatch.setattr(os, "scandir", lambda folder, real=os.scandir: calls.append(folder) or real(folder))
    lists = {"train_x": [item(0, path=path) for path in there + gone[:2]], "test": [item(0, path=p) for p in gone]}
    with pytest.raises(InputError) as caught:
        DatasetBase(**lists)
    text = str(caught.value)
    assert "DatasetBase" in text and "7 of 10" in text
    assert [str(path) in text for path in gone] == [True] * 5 + [False] * 2
    assert len(calls) == 2  # one listing per folder
    DatasetBase(train_x=lists["train_x"][:3])


def test_fewshot_visits_classes_in_order_of_appearance():
    source = items(*([2] * 5 + [0] * 5 + [1] * 2))
    picked = InMemory(train_x=items(0)).generate_fewshot_dataset(source, num_shots=3, rng=random.Random(1))
    oracle, expected = random.Random(1), []
    for label in (2, 0):
        expected += oracle.sample([it for it in source if it.label == label], 3)
    expected += [it for it in source if it.label == 1]  # too few: kept as they are, without a draw
    assert picked == expected


def test_fewshot_uses_the_global_random_unless_told():
    source, dataset = items(*([0] * 9 + [1] * 9)), InMemory(train_x=items(0))
    random.seed(5)
    first = dataset.generate_fewshot_dataset(source, num_shots=2)
    state = random.getstate()
    assert first == dataset.generate_fewshot_dataset(source, num_shots=2, rng=random.Random(5))
    assert random.getstate() == state


def test_fewshot_repeat_several_and_none(caplog):
    source, dataset = items(0, 0, 1), InMemory(train_x=items(0))
    with caplog.at_level("INFO"):
        drawn = dataset.generate_fewshot_dataset(source, num_shots=4, repeat=True, rng=random.Random(0))
    assert [it.label for it in drawn] == [0] * 4 + [1] * 4
    assert caplog.messages == ["Picking at most 4 images of each class"]
    both = dataset.generate_fewshot_dataset(source, source, num_shots=1, rng=random.Random(0))
    assert isinstance(both, list) and [len(part) for part in both] == [2, 2]
    assert dataset.generate_fewshot_dataset(source, num_shots=-1) is source
    assert dataset.generate_fewshot_dataset(source, source, num_shots=0) == (source, source)


def test_grouping():
    source = [item(1, domain=1), item(0), item(1)]
    dataset = InMemory(train_x=items(0))
    assert list(dataset.split_dataset_by_label(source).items()) == [(1, [source[0], source[2]]), (0, [source[1]])]
    assert list(dataset.split_dataset_by_domain(source).items()) == [(1, [source[0]]), (0, [source[1], source[2]])]


def test_domains():
    dataset = InMemory(train_x=items(0))
    dataset.check_input_domains(["photo"], ["sketch"])
    with pytest.raises(InputError, match='target domain.*"painting"'):
        dataset.check_input_domains(["photo"], ["painting"])


def test_download_data_unpacks(tmp_path):
    dataset = InMemory(train_x=items(0))
    (tmp_path / "a.txt").write_text("a")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.txt", "in/zip.txt")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.txt", "in/tar.txt")
    dataset.download_data("", str(tmp_path / "a.zip"))  # there already: only unpacked
    target = tmp_path / "new" / "a.tar.gz"
    dataset.download_data((tmp_path / "a.tar.gz").as_uri(), str(target), from_gdrive=False)
    assert (tmp_path / "in" / "zip.txt").read_text() == (tmp_path / "new" / "in" / "tar.txt").read_text() == "a"
    with pytest.raises(InputError, match="neither"):
        dataset.download_data("", str(tmp_path / "a.txt"))


def test_build_dataset(monkeypatch, caplog):
    class Nothing(InMemory):
        def __init__(self, cfg):
            super().__init__(train_x=items(0))

    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "Nothing", Nothing)
    cfg = get_cfg_default()
    cfg.DATASET.NAME = "Nothing"
    with caplog.at_level("INFO"):
        assert type(build_dataset(cfg)) is Nothing
    assert caplog.messages == ["Loading dataset: Nothing"]
    cfg.DATASET.NAME = "nothin"
    with pytest.raises(InputError, match='did you mean "Nothing"'):
        build_dataset(cfg)

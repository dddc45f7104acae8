"""Doubtful labels: the scores beside plain loops, what is dropped or relabeled, and the files of a run."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dassl.data.datasets import Datum
from dassl.engine import build_trainer
from dassl.utils import set_random_seed
from trainers.app.configuration import default_cfg
from trainers.base.label_check import LabelCheck, check_labels, clean
from trainers.features.suspicious import LabelScores, label_scores, precision_at


def random_problem(n=30, classes=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes - 1, (n - classes,), generator=g)])
    return (
        F.normalize(torch.randn(n, 8, generator=g), dim=1),
        labels,
        F.normalize(torch.randn(classes, 8, generator=g), dim=1),
    )


@pytest.mark.parametrize("k", [1, 3, 5, 100])
def test_scores_are_those_of_plain_loops(k):
    features, labels, zeroshot = random_problem()  # the last class has a single image
    got = label_scores(features, labels, zeroshot, 10.0, k)
    n = len(labels)
    for i in range(n):
        p = torch.softmax(10 * zeroshot @ features[i], dim=0)
        others = sorted((j for j in range(n) if j != i), key=lambda j: -float(features[i] @ features[j]))
        alike = sum(int(labels[j] == labels[i]) for j in others)
        near = others[: max(1, min(k, alike))]
        share = sum(int(labels[j] == labels[i]) for j in near) / len(near) if alike else float(p[labels[i]])
        votes = [sum(int(labels[j] == c) for j in near) + float(p[c]) for c in range(len(zeroshot))]
        assert float(got.probability[i]) == pytest.approx(float(p[labels[i]]), abs=1e-6)
        assert float(got.agreement[i]) == pytest.approx(share, abs=1e-6)
        assert float(got.suspicion[i]) == pytest.approx(1 - (float(p[labels[i]]) + share) / 2, abs=1e-6)
        assert int(got.clip[i]) == int(p.argmax()) and int(got.neighbors[i]) == votes.index(max(votes))


def test_a_single_image_has_no_neighbors():
    features, labels, zeroshot = random_problem()
    one = label_scores(features[:1], labels[:1], zeroshot, 10.0)
    assert float(one.agreement[0]) == float(one.probability[0]) and int(one.neighbors[0]) == int(one.clip[0])


def test_precision_counts_the_wrong_ones_at_the_head_of_the_list():
    wrong = torch.tensor([True, False, True, False])
    assert precision_at(torch.tensor([2, 0, 1, 3]), wrong) == 100
    assert precision_at(torch.tensor([2, 1, 0, 3]), wrong) == 50


def scores(suspicion, clip, neighbors):
    nothing = torch.zeros(len(suspicion))
    return LabelScores(nothing, nothing, torch.tensor(suspicion), torch.tensor(clip), torch.tensor(neighbors))


def test_cleaning_drops_or_relabels_and_spares_one_image_of_each_class():
    labels = [0, 0, 0, 1, 1]
    found = scores([0.1, 0.9, 0.95, 0.99, 0.9], clip=[0, 1, 1, 0, 0], neighbors=[0, 1, 0, 0, 0])
    assert clean(labels, found, "drop") == [(0, 0), (4, 1)]
    # The second: both say 1. The third: they disagree, so that nothing is known. The last is spared.
    assert clean(labels, found, "relabel") == [(0, 0), (1, 1), (2, 0), (3, 0), (4, 1)]
    assert clean(labels, scores([0.5] * 5, [1] * 5, [1] * 5), "drop", 0.5) == list(enumerate(labels))


def default_cfg_with(cleaning):
    cfg = default_cfg()
    cfg.DATASET.CLEANING = cleaning
    return cfg


def build(folder, *pairs, config="configs/trainers/gda/tiny.yaml"):
    cfg = default_cfg()
    cfg.merge_from_file(config)
    cfg.merge_from_list(["DATASET.NAME", "Digits", "DATASET.NUM_SHOTS", 4, "SEED", 101, "OUTPUT_DIR", str(folder)])
    cfg.merge_from_list(["USE_CUDA", False, "TEST.SPLIT", "val", "DATASET.LABEL_NOISE", 0.5, *pairs])
    cfg.freeze()
    set_random_seed(101)
    return build_trainer(cfg)


def test_a_run_lists_doubtful_labels_and_says_how_good_the_list_is(digits_cache, tmp_path):
    trainer = build(tmp_path, "DATASET.SUSPICIOUS", True)
    trainer.train()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["label_noise"]["flipped"] == 20 and "cleaning" not in metrics
    with open(tmp_path / "suspicious.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with open(tmp_path / "label_noise.csv", newline="") as stream:
        wrong = {row["image"] for row in csv.DictReader(stream)}
    assert len(rows) == 40 and [float(row["suspicion"]) for row in rows] == sorted(
        (float(row["suspicion"]) for row in rows), reverse=True
    )
    hits = sum(row["image"] in wrong for row in rows[:20])
    assert metrics["suspicious"]["precision"] == pytest.approx(100 * hits / 20) and hits > 13
    doubted = [row["image"] in wrong for row in rows if float(row["suspicion"]) > 0.8]
    assert metrics["suspicious"]["above_threshold"] == len(doubted) > 0
    assert metrics["suspicious"]["precision_above"] == pytest.approx(100 * sum(doubted) / len(doubted))
    assert metrics["suspicious"]["recall_above"] == pytest.approx(100 * sum(doubted) / 20)
    assert len(trainer.dm.dataset.train_x) == 40  # a list changes nothing


@pytest.mark.parametrize("how", ["drop", "relabel"])
def test_cleaning_reaches_features_and_images_alike(digits_cache, tmp_path, how):
    pairs = ("DATASET.CLEANING", how, "OPTIM.MAX_EPOCH", 1)
    by_config = {}
    for config in ("gda", "coop"):
        trainer = build(tmp_path / config, *pairs, config=f"configs/trainers/{config}/tiny.yaml")
        trainer.train()
        by_config[config] = trainer.dm.dataset.train_x
        metrics = json.loads((tmp_path / config / "metrics.json").read_text())
        noted = metrics["cleaning"]
        assert noted["images"] == 40 and noted["wrong_before"] == 20 and noted["wrong_after"] < 20
        assert len(trainer.train_loader_x.dataset) == metrics["train_images"]["total"] == 40 - noted["dropped"]
        assert noted["dropped"] > 0 if how == "drop" else (noted["dropped"] == 0 and noted["relabeled"] > 0)
        assert not (tmp_path / config / "suspicious.csv").exists() and "suspicious" not in metrics
    assert by_config["gda"] == by_config["coop"]
    assert {item.label for item in by_config["gda"]} == set(range(10))


def test_classes_may_share_a_name_and_foreign_images_are_wrong():
    items = [Datum(f"/{row}.png", label, 0, "crane") for row, label in enumerate([0, 1, 1])]
    dataset = SimpleNamespace(train_x=items, classnames=["crane", "crane"])
    check = LabelCheck(dataset, scores([0.9, 0.1, 0.95], [1, 1, 0], [1, 1, 0]), True, [1, 1, -1])
    assert check.notes()["suspicious"] == {
        "images": 3, "above_threshold": 2, "threshold": 0.8, "wrong": 2, "precision": 100.0, "precision_above": 100.0,
        "recall_above": 100.0,
    }  # fmt: skip
    assert check.decide("drop") == [(0, 0), (1, 1)]
    assert (check.cleaning["wrong_before"], check.cleaning["wrong_after"]) == (2, 1)


def test_bad_input(digits_cache, tmp_path):
    with pytest.raises(ValueError, match="CLEANING to be none with SimpleNamespace, which has no keep_training"):
        check_labels(default_cfg_with("drop"), SimpleNamespace(dataset=None), None, None, None)
    with pytest.raises(ValueError, match="DATASET.CLEANING to be one of none, drop, relabel but got 'wash'"):
        build(tmp_path, "DATASET.CLEANING", "wash")

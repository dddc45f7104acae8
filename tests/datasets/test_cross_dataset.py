"""Train on one benchmark's miniature, evaluate on others, through train.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dataset_trees import make_tree

from trainers.app import train

CHECKOUT = Path(train.__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in ("ImageNet", "ImageNetV2", "ImageNetA", "EuroSAT"):
        make_tree(name, root)
    return root


@pytest.fixture(scope="module")
def run(root, random_tiny, tmp_path_factory):
    """Run train.py with a dataset's config; returns the exit code and the output folder."""
    runs = tmp_path_factory.mktemp("runs")

    def run(dataset: str, output: str, *flags: str, pairs: tuple[str, ...] = ()) -> tuple[int, Path]:
        code = train.main(
            [
                *("--root", str(root), "--trainer", "DLRCLIP", "--seed", "1", "--output-dir", str(runs / output)),
                *("--config-file", str(CHECKOUT / "configs" / "trainers" / "dlr" / "tiny.yaml")),
                *("--dataset-config-file", str(CHECKOUT / "configs" / "datasets" / f"{dataset}.yaml"), *flags),
                *("MODEL.BACKBONE.WEIGHTS", str(random_tiny), "USE_CUDA", "False", "DATASET.NUM_SHOTS", "4"),
                *("OPTIM.MAX_EPOCH", "1", "DATALOADER.NUM_WORKERS", "0", *pairs),
            ]
        )
        return code, runs / output

    return run


@pytest.fixture(scope="module")
def trained(run) -> Path:
    code, folder = run("imagenet", "source")
    assert code == 0
    return folder


def test_imagenet_chooses_on_training_images_that_were_not_picked(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["selected"]["beta"]["on"] == "val" and metrics["selected"]["beta"]["n"] == 16


def test_with_coops_validation_nothing_is_chosen(run):
    code, folder = run("imagenet", "coop", pairs=("DATASET.VAL", "coop"))
    assert code == 0
    chosen = json.loads((folder / "metrics.json").read_text())["selected"]["beta"]
    assert chosen["on"] != "val" and chosen["n"] == 0


@pytest.mark.parametrize(("dataset", "images"), [("imagenetv2", 12), ("imagenet_a", 6), ("eurosat", 12)])
def test_evaluates_elsewhere(run, trained, dataset, images):
    code, folder = run(dataset, dataset, "--eval-only", "--model-dir", str(trained))
    assert code == 0
    assert json.loads((folder / "metrics.json").read_text())["test"]["n"] == images


def test_test_sets_are_not_trained_on(run, capsys):
    code, folder = run("imagenet_a", "refused")
    assert code == 2
    assert "ImageNetA has test images only" in capsys.readouterr().err
    assert not folder.exists()

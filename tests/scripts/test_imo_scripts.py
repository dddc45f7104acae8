"""Scripts around the adapters of IMO, on random ones: tables, files, and what they refuse."""

import json
import shutil

import pytest
import torch

import datasets
import trainers
from dassl.config import get_cfg_default
from dassl.data.datasets import DATASET_REGISTRY
from dassl.engine import build_trainer
from scripts import measure_imo, search_params
from scripts.figures import plot_overlap
from trainers.clip import load_clip
from trainers.features.corrected import load_adapters
from trainers.imo import measure


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch):
    """Digits with every 10th of its test images."""
    whole = DATASET_REGISTRY.get("Digits")

    class Digits(whole):
        def __init__(self, cfg):
            super().__init__(cfg)
            self._test = self._test[::10]

    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "Digits", Digits)


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:] if line]


def test_overlap_of_test_images(random_tiny, random_adapters, tmp_path, capsys):
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(random_adapters, again)
    arguments = [str(random_adapters), str(again), "--datasets", "Digits", "--weights", str(random_tiny)]
    assert plot_overlap.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    first, second, mean = rows(capsys.readouterr().out)
    assert first[2:] == second[2:] == mean[2:] and mean[1] == "mean"
    clip = load_clip("tiny", random_tiny)
    batches = list(plot_overlap.loader_of("Digits", "", ["test"], clip))
    images, labels = (torch.cat([batch[key] for batch in batches]) for key in ("img", "label"))
    with torch.no_grad():
        before = measure(clip.encode_image(images), labels)
        after = measure(load_adapters(random_adapters, clip).encode(clip, images), labels)
    assert len(labels) == 54 and first[2] == f"{before.overlap:.4f} -> {after.overlap:.4f}"
    both = plot_overlap.loader_of("Digits", "", ["val", "test"], clip)
    assert len(both.dataset) == 54 + len(plot_overlap.loader_of("Digits", "", ["val"], clip).dataset)
    assert (tmp_path / "out" / "digits.png").stat().st_size > 1000
    record = json.loads((tmp_path / "out" / "overlap.json").read_text())
    assert record["datasets"]["Digits"]["after"][0]["variance"] == pytest.approx(after.variance)


def test_wrong_arguments(tmp_path, capsys):
    assert plot_overlap.main([str(tmp_path)]) == 2
    assert "Expected MODEL.IMO_WEIGHTS to be a file" in capsys.readouterr().err
    for script, arguments in (
        (plot_overlap, ["a", "--datasets", "Digit"]),
        (search_params, ["a", "--dataset", "Digit"]),
    ):
        with pytest.raises(SystemExit):
            script.main(arguments)
        assert "Digits" in capsys.readouterr().err


@pytest.mark.parametrize("trainer", ["TipAdapterPP", "TipXPP"])
def test_search_averages_validation_accuracy_over_seeds(trainer, random_tiny, random_adapters, tmp_path, capsys):
    node = {"TipAdapterPP": "TIPADAPTERPP", "TipXPP": "TIPXPP"}[trainer]
    settings = [
        "MODEL.BACKBONE.WEIGHTS",
        str(random_tiny),
        f"TRAINER.{node}.SEARCH_STEP",
        "(4, 3)",
        "USE_CUDA",
        "False",
    ]
    settings += ["TRAINER.TIPXPP.GAMMA_STEP", "2"] if trainer == "TipXPP" else []
    pairs = [part for i in range(0, len(settings), 2) for part in ("--set", *settings[i : i + 2])]
    command = [str(random_adapters), "--dataset", "Digits", "--seeds", "1,2", "--shots", "1", "--augment-epochs", "2"]
    assert search_params.main([*command, "--trainer", trainer, *pairs]) == 0
    (row,) = rows(capsys.readouterr().out)
    grids, found = [], []
    for seed in (1, 2):
        cfg = get_cfg_default()
        datasets.extend_cfg(cfg)
        trainers.extend_cfg(cfg)
        cfg.merge_from_file(f"configs/trainers/{search_params.FOLDERS[trainer]}/tiny.yaml")
        cfg.merge_from_list(["DATASET.NAME", "Digits", "DATASET.NUM_SHOTS", 1, "SEED", seed])
        cfg.merge_from_list(["MODEL.IMO_WEIGHTS", str(random_adapters), "OUTPUT_DIR", str(tmp_path / str(seed))])
        cfg.merge_from_list([f"TRAINER.{node}.VIEWS", 2, *settings])
        cfg.freeze()
        one = build_trainer(cfg)
        with torch.no_grad():
            one.prepare(one.train_features.all())
            grids.append(one.grid(*one.validation_features()))
        found.append(one)
    mean = (grids[0] + grids[1]) / 2
    axes = found[0].axes()
    best = (mean == mean.max()).nonzero().tolist()
    i, j, k = min(best, key=lambda place: (place[2], place[0], place[1]))  # of equals the least alpha, as in the source
    assert row[:3] == ["1", f"{axes['alphas'][k]:.3g}", f"{axes['betas'][i]:.3g}"]
    right = []
    for one in found:
        learner = one.network.learner
        learner.alpha.fill_(axes["alphas"][k])
        learner.beta.fill_(axes["betas"][i])
        if trainer == "TipXPP":
            learner.gamma.fill_(axes["gammas"][j])
        known = one.test_loader.all()
        right.append(100 * float((learner(known.values[0]).argmax(1) == known.labels).double().mean()))
    assert row[-1].startswith(f"{sum(right) / 2:.2f}") and row[-3] == f"{float(mean.max()):.2f}"


def test_measurement_compares_with_the_same_picks(random_tiny, random_adapters, tmp_path, capsys):
    arguments = [f"IMO={random_adapters},{random_adapters}", "--sources", "Digits", "--shots", "1"]
    out = tmp_path / "numbers.json"
    assert measure_imo.main([*arguments, "--weights", str(random_tiny), "--out", str(out)]) == 0
    overlap, gain = capsys.readouterr().out.split("\n\n")
    assert [row[:2] for row in rows(overlap)] == [["Digits", "CLIP"], ["Digits", "IMO/1"], ["Digits", "IMO/2"]]
    (row,) = rows(gain)
    assert row[:2] == ["IMO", "Digits to Digits"]
    record = json.loads(out.read_text())["accuracy"]
    gains = [pp - tip for *_, tip, pp in record]
    assert [entry[3:5] for entry in record] == [[1, 1], [1, 2]]
    assert row[3] == measure_imo.interval(gains)


def test_interval_is_student_s():
    assert measure_imo.interval([1.0, 2.0, 3.0]) == f"+2.00 ± {4.302653 * 1 / 3**0.5:.2f}"
    assert measure_imo.interval([-0.5]) == "-0.50"

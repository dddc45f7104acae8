"""DeIL's direct head beside the formulas of its docstring, written out with numpy and loops."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import datasets
import trainers
from dassl.config import get_cfg_default
from trainers.deil import DeILLearner, deil_logits, info_nce, standardized

WIDTH, CLASSES = 24, 5


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def naive_logits(clip_logits, own, alpha, beta):
    rows = []
    for zeroshot, z in zip(clip_logits.double().numpy(), own.double().numpy(), strict=True):
        z = (z - z.mean()) / z.std(ddof=1)
        rows.append([s + alpha * np.exp(-beta * (1 - value)) for s, value in zip(zeroshot, z, strict=True)])
    return torch.tensor(np.array(rows))


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.5), (0.0, 3.0), (2.5, 7.0)])
def test_logits(alpha, beta):
    clip_logits, own = 20 * unit(6, CLASSES, seed=1), 3 * unit(6, CLASSES, seed=2)
    got = deil_logits(clip_logits, standardized(own), alpha, beta)
    torch.testing.assert_close(got.double(), naive_logits(clip_logits, own, alpha, beta), atol=1e-4, rtol=1e-5)
    # Only what distinguishes the classes of an image counts: neither a log-softmax nor another scale changes it.
    torch.testing.assert_close(standardized(7 * own.log_softmax(dim=1)), standardized(own), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(standardized(torch.zeros(2, CLASSES))).all()
    assert torch.equal(standardized(torch.ones(2, 1)), torch.zeros(2, 1))


def test_contrast_counts_other_classes_only():
    anchors, positives = torch.randn(6, 8), torch.randn(6, 8)
    labels = [0, 0, 1, 2, 1, 0]
    terms = []
    for i in range(6):
        cosines = {j: float(F.cosine_similarity(anchors[i], positives[j], dim=0)) / 0.1 for j in range(6)}
        others = [np.exp(cosines[j]) for j in range(6) if labels[j] != labels[i]]
        terms.append(-np.log(np.exp(cosines[i]) / (np.exp(cosines[i]) + sum(others))))
    assert float(info_nce(anchors, positives, torch.tensor(labels))) == pytest.approx(np.mean(terms), rel=1e-5)


def test_training_uses_the_given_strengths_and_evaluation_the_chosen_ones(make_clip, names):
    learner = DeILLearner(make_clip(), names, unit(5, 24), alpha=1.0, beta=0.5)
    x = unit(6, 24, seed=3)
    learner.alpha.fill_(0.0)
    learner.eval()
    torch.testing.assert_close(learner(x), learner.clip_logits(x) + 0 * learner(x))
    learner.train()
    assert not torch.allclose(learner(x), learner.clip_logits(x))


@pytest.fixture
def make_cfg(tmp_path, random_tiny):
    def make(name, *pairs, out="run"):
        cfg = get_cfg_default()
        datasets.extend_cfg(cfg)
        trainers.extend_cfg(cfg)
        cfg.merge_from_file("configs/trainers/deil/tiny.yaml")
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / out), "DATASET.NAME", "Digits", "DATASET.NUM_SHOTS", 2])
        cfg.merge_from_list(["MODEL.BACKBONE.WEIGHTS", str(random_tiny), "USE_CUDA", False, "SEED", 1])
        cfg.merge_from_list(["OPTIM.MAX_EPOCH", 2, "TEST.SPLIT", "val", "TRAINER.DEIL.VIEWS", 2, *pairs])
        cfg.freeze()
        return cfg

    return make


def test_a_run_compares_two_views_and_chooses_on_validation_images(make, tmp_path):
    trainer = make("DeIL", "DATASET.CLEANING", "none")
    batch = next(iter(trainer.train_loader_x))
    both, labels = trainer.parse_batch_train(batch)
    known = trainer.train_features.all()
    torch.testing.assert_close(both, known.values[:, batch["index"]].transpose(0, 1))
    assert labels.tolist() == batch["label"].tolist()
    trainer.train()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {name: (choice["on"], choice["n"]) for name, choice in metrics["selected"].items()} == {
        "alpha": ("val", 20),
        "beta": ("val", 20),
    }
    assert {"loss_ce", "loss_nce"} <= metrics["train"].keys()
    learner = trainer.network.learner
    assert float(learner.alpha) == pytest.approx(metrics["selected"]["alpha"]["value"])

    again = make("DeIL", out="other")
    again.load_model(str(tmp_path / "run"))
    assert again.selected == trainer.selected
    features = unit(4, 32, seed=5)
    for one in (trainer, again):
        one.set_model_mode("eval")
    torch.testing.assert_close(again.model_inference(features), trainer.model_inference(features))


def test_without_search_the_given_values_stay(make):
    trainer = make("DeIL", "TRAINER.DEIL.SEARCH", False, "TRAINER.DEIL.GAMMA", 0.0, "TRAINER.DEIL.VIEWS", 0)
    trainer.train()
    assert trainer.selected["alpha"] == {"value": 1.0, "on": "not searched", "n": 0}


def test_part_of_the_classes(make_clip, names):
    whole = DeILLearner(make_clip(), names, unit(5, 24))
    part = DeILLearner(make_clip(), [names[3], names[1]], unit(5, 24)[[3, 1]])
    part.take(whole.state_dict(), None)
    x = unit(6, 24, seed=3)
    for learner in (whole, part):
        learner.eval()
    own = whole.classifier(whole.hidden(x))[:, [3, 1]]
    torch.testing.assert_close(part(x), deil_logits(whole.clip_logits(x)[:, [3, 1]], standardized(own), 1.0, 0.5))


def test_bad_input(make):
    with pytest.raises(ValueError, match="TRAINER.DEIL.VIEWS to be at least 2 with TRAINER.DEIL.GAMMA above 0"):
        make("DeIL", "TRAINER.DEIL.VIEWS", 1)
    with pytest.raises(ValueError, match="BETA_MAX"):
        make("DeIL", "TRAINER.DEIL.BETA_MAX", 0.1)

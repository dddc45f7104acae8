import math

import pytest
import torch
from torch.nn import functional as F

import datasets
import trainers
from dassl.config import get_cfg_default
from trainers.features.corrected import CorrectedEncoder
from trainers.features.encoder import FeatureSet
from trainers.linear_probe import ProbeLearner
from trainers.modules.overlap_adapters import IMOAdapters
from trainers.tip_adapter.search import best_point, grid_accuracy, grid_of
from trainers.tip_adapter.tip import TipLearner
from trainers.tip_adapter.tipx import TipXLearner, TipXPP, divergences


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def kl(p, q):
    return sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))


def naive(f, corrected, w, keys, originals, labels, alpha, beta, gamma, scale, t=0.5):
    """The formulas, image by image and key by key: cosines over t, psi to the range of the cosines."""
    everyone = [(x @ w.t() / t).softmax(0) for x in originals]
    pairs = [(i, j) for i in range(len(keys)) for j in range(len(keys)) if i != j]
    far = [kl(everyone[i], everyone[j]) for i, j in pairs]
    alike = [float(keys[i] @ keys[j]) for i, j in pairs]
    rows = []
    for x, y in zip(f, corrected, strict=True):
        row = [scale * float(x @ c) for c in w]
        for key, q, label in zip(keys, everyone, labels.tolist(), strict=True):
            row[label] += alpha * math.exp(-beta * (1 - float(y @ key)))
            share = (kl((x @ w.t() / t).softmax(0), q) - min(far)) / (max(far) - min(far))
            row[label] -= gamma * (min(alike) + (max(alike) - min(alike)) * share)
        rows.append(row)
    return torch.tensor(rows)


@pytest.fixture
def data():
    f, corrected = unit(6, 24), unit(6, 24, seed=7)
    return f, corrected, unit(5, 24, seed=1), unit(11, 24, seed=2), unit(11, 24, seed=3), torch.arange(11) % 5


def test_tip_adapter_pp_compares_corrected_features_and_matches_text_with_original_ones(data, make_clip, names):
    f, corrected, w, keys, originals, labels = data
    learner = TipLearner(make_clip(), names, w, n=11, alpha=1.3, beta=4.2, trained=False)
    learner.keys.copy_(keys)
    learner.key_labels.copy_(labels)
    want = naive(f, corrected, w, keys, originals, labels, 1.3, 4.2, 0.0, 100.0)
    torch.testing.assert_close(learner(torch.cat([f, corrected], dim=1)), want, rtol=1e-4, atol=2e-3)
    clip_logits = learner.clip_logits(torch.cat([f, corrected], dim=1))
    torch.testing.assert_close(clip_logits, 100 * f @ w.t(), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("pp", [False, True])
def test_tip_x(data, make_clip, names, pp):
    f, corrected, w, keys, originals, labels = data
    learner = TipXLearner(make_clip(), names, w, n=11, alpha=1.3, beta=4.2, gamma=0.7)
    if not pp:
        corrected, keys = f, originals
    learner.keys.copy_(keys)
    learner.key_originals.copy_(originals)
    learner.key_labels.copy_(labels)
    learner.find_range()
    want = naive(f, corrected, w, keys, originals, labels, 1.3, 4.2, 0.7, 100.0)
    torch.testing.assert_close(learner(torch.cat([f, corrected], dim=1) if pp else f), want, rtol=1e-4, atol=5e-3)


def test_divergences_and_their_range(data):
    f, _, w, _, originals, _ = data
    got = divergences(f @ w.t(), originals @ w.t())
    for i in range(6):
        for j in range(11):
            want = kl((f[i] @ w.t()).softmax(0), (originals[j] @ w.t()).softmax(0))
            assert float(got[i, j]) == pytest.approx(want, abs=1e-5)


def test_a_checkpoint_of_the_earlier_third_term_computes_what_it_did(data, make_clip, names):
    """t was 1 and psi(-KL) = 1 - (1 - exp(-beta (1 - least cosine))) KL / largest KL."""
    f, _, w, _, originals, labels = data
    state = TipXLearner(make_clip(), names, w, n=11, alpha=1.3, beta=4.2, gamma=0.7).state_dict()
    for name in ("line", "temperature"):
        del state[name]
    state |= {"keys": originals, "key_originals": originals, "key_labels": labels}
    state["farthest"] = torch.tensor([0.02, -0.5], dtype=torch.float64)
    learner = TipXLearner(make_clip(), names, w, n=11, alpha=9.0, beta=9.0, gamma=9.0)
    learner.take(state)
    everyone = [(x @ w.t()).softmax(0) for x in originals]
    want = []
    for x in f:
        row = [100 * float(x @ c) for c in w]
        for key, q, label in zip(originals, everyone, labels.tolist(), strict=True):
            row[label] += 1.3 * math.exp(-4.2 * (1 - float(x @ key)))
            row[label] += 0.7 * (1 - (1 - math.exp(-4.2 * 1.5)) * kl((x @ w.t()).softmax(0), q) / 0.02)
        want.append(row)
    torch.testing.assert_close(learner(f), torch.tensor(want), rtol=1e-4, atol=5e-3)


def test_grids_are_the_sources():
    cfg = get_cfg_default()
    trainers.extend_cfg(cfg)
    for node, alphas, betas, gammas in (
        ("TIPX", [0.1 + 49.9 * i / 20 for i in range(20)], [1 + 49 * i / 200 for i in range(200)],
         [0.1 + 29.9 * i / 50 for i in range(50)]),
        ("TIPXPP", [20 * i / 199 for i in range(200)], [20 * i / 19 for i in range(20)],
         [30 * i / 49 for i in range(50)]),
        ("TIPADAPTERPP", [20 * i / 199 for i in range(200)], [20 * i / 19 for i in range(20)], None),
    ):  # fmt: skip
        grid = grid_of(cfg.TRAINER[node].GRID, "Food101")
        assert grid.alpha.values() == pytest.approx(alphas) and grid.beta.values() == pytest.approx(betas)
        assert gammas is None or grid.gamma.values() == pytest.approx(gammas)
        assert grid.first == "alpha"
        assert node == "TIPADAPTERPP" or cfg.TRAINER[node].TEMPERATURE == 0.5


def test_keys_are_means_of_corrected_views(make_clip, names):
    original, corrected = unit(3, 4, 24), unit(3, 4, 24, seed=5)
    learner = TipXLearner(make_clip(), names, unit(5, 24, seed=1), n=4, alpha=1.0, beta=5.5, gamma=0.1)
    features = FeatureSet(torch.cat([original, corrected], dim=-1), torch.arange(4), ())

    class Network:
        pass

    trainer = TipXPP.__new__(TipXPP)
    trainer.network = Network()
    trainer.network.learner = learner
    trainer.prepare(features)
    for i in range(4):
        mean = corrected[:, i].mean(0)
        torch.testing.assert_close(learner.keys[i], mean / mean.norm())
        mean = original[:, i].mean(0)
        torch.testing.assert_close(learner.key_originals[i], mean / mean.norm())
    assert learner.key_labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("at_once", [1, 2**24])
def test_grid_is_brute_force(data, monkeypatch, at_once):
    _, _, w, keys, _, key_labels = data
    monkeypatch.setattr("trainers.tip_adapter.search.GRID_NUMBERS", at_once)
    f, labels = unit(30, 24, seed=9), torch.arange(30) % 5
    alphas, betas, gammas = [0.5, 2.0, 9.0], [1.0, 6.0], [0.1, 3.0]
    clip_logits, affinity = 3 * f @ w.t(), f @ keys.t()
    text = torch.randn(30, 5, generator=torch.Generator().manual_seed(4))
    got = grid_accuracy(clip_logits, affinity, key_labels, labels, alphas, betas, text, gammas)
    assert got.shape == (2, 2, 3)
    values = F.one_hot(key_labels, 5).float()
    for i, beta in enumerate(betas):
        for j, gamma in enumerate(gammas):
            for k, alpha in enumerate(alphas):
                logits = clip_logits + alpha * torch.exp(-beta * (1 - affinity)) @ values + gamma * text
                right = 100 * float((logits.argmax(1) == labels).double().mean())
                assert float(got[i, j, k]) == pytest.approx(right)
    point = best_point(got, alphas, betas, gammas)
    assert point.accuracy == float(got.max())
    assert float(got[betas.index(point.beta), gammas.index(point.gamma), alphas.index(point.alpha)]) == point.accuracy


@torch.no_grad()
def test_encoder_gives_both_features_and_a_digest_of_its_own(make_clip, images):
    clip = make_clip()
    torch.manual_seed(0)
    adapters = IMOAdapters(clip.visual.widths, 4)
    for p in adapters.parameters():
        torch.nn.init.normal_(p, std=0.2)
    encoder = CorrectedEncoder(clip, "fp32", torch.no_grad, adapters)
    both = encoder(images)
    assert both.shape == (6, encoder.width) == (6, 48)
    torch.testing.assert_close(both[:, :24], F.normalize(clip.encode_image(images), dim=-1))
    torch.testing.assert_close(both[:, 24:], adapters.encode(clip, images))
    raw = encoder.raw()(images)
    torch.testing.assert_close(raw[:, :24], clip.encode_image(images))
    torch.testing.assert_close(F.normalize(raw[:, 24:], dim=-1), both[:, 24:])
    assert encoder.unit and not torch.allclose(raw[:, 24:].norm(dim=-1), torch.ones(6))
    digest = encoder.weights_digest
    assert digest != clip.weights_digest
    adapters.blocks["2"].up.bias[0] += 1
    assert encoder.weights_digest != digest


def test_a_probe_sees_corrected_features_only(make_clip, names):
    learner = ProbeLearner(make_clip(), names, unit(5, 24), trained=False)
    learner.get_buffer("weight").copy_(unit(5, 24, seed=4))
    f, corrected = unit(6, 24), unit(6, 24, seed=7)
    torch.testing.assert_close(learner(torch.cat([f, corrected], dim=1)), corrected @ unit(5, 24, seed=4).t())


@pytest.fixture
def make_cfg(tmp_path, random_tiny):
    folders = {"TipAdapterPP": "tip_adapter_pp", "LinearProbe": "linear_probe", "TipAdapter": "tip_adapter"}

    def make(name, *pairs):
        cfg = get_cfg_default()
        datasets.extend_cfg(cfg)
        trainers.extend_cfg(cfg)
        cfg.merge_from_file(f"configs/trainers/{folders[name]}/tiny.yaml")
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / "run"), "DATASET.NAME", "Digits", "DATASET.NUM_SHOTS", 1])
        cfg.merge_from_list(["MODEL.BACKBONE.WEIGHTS", str(random_tiny), "USE_CUDA", False, *pairs])
        cfg.freeze()
        return cfg

    return make


def test_adapters_are_asked_for_and_refused(make, random_adapters, tmp_path):
    with pytest.raises(ValueError, match="which TipAdapterPP needs"):
        make("TipAdapterPP")
    with pytest.raises(FileNotFoundError, match="but there is no"):
        make("TipAdapterPP", "MODEL.IMO_WEIGHTS", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="to be '' for TipAdapter, which uses no corrected"):
        make("TipAdapter", "MODEL.IMO_WEIGHTS", str(random_adapters))


def test_a_probe_may_use_adapters(make, random_adapters):
    plain, corrected = make("LinearProbe"), make("LinearProbe", "MODEL.IMO_WEIGHTS", str(random_adapters))
    batch = next(iter(plain.test_loader.loader))["img"][:4]
    assert corrected.network.encode(batch).shape == (4, 64) and plain.network.encode(batch).shape == (4, 32)
    torch.testing.assert_close(corrected.model_heads(batch)["clip"], plain.model_heads(batch)["clip"])

import math

import pytest
import torch

import datasets
import trainers
from dassl.config import get_cfg_default
from trainers.features.encoder import FeatureSet
from trainers.tip_adapter.search import GRIDS, Axis, best_point, grid_accuracy, grid_of, tip_values
from trainers.tip_adapter.tip import TipAdapter, TipLearner, tip_logits


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def naive_tip(f, w, keys, key_labels, alpha, beta, scale):
    """The method's formula over one-hot values, number by number."""
    values = torch.nn.functional.one_hot(key_labels, len(w)).float()
    rows = []
    for x in f:
        weights = torch.stack([torch.exp(-beta * (1 - (x * k).sum())) for k in keys])
        rows.append(torch.stack([scale * (x * c).sum() for c in w]) + alpha * weights @ values)
    return torch.stack(rows)


@pytest.fixture
def data():
    return unit(6, 24), unit(5, 24, seed=1), unit(11, 24, seed=2), torch.arange(11) % 5


def test_logits(data):
    f, w, keys, labels = data
    want = naive_tip(f, w, keys, labels, 1.3, 4.2, 1.0)
    torch.testing.assert_close(tip_logits(f, f @ w.t(), keys, labels, 1.3, 4.2), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_learner(data, make_clip, names, trained):
    f, w, keys, labels = data
    learner = TipLearner(make_clip(), names, w, n=11, alpha=1.3, beta=4.2, trained=trained)
    with torch.no_grad():
        learner.keys.copy_(keys)
        learner.key_labels.copy_(labels)
    torch.testing.assert_close(learner(f), naive_tip(f, w, keys, labels, 1.3, 4.2, 100.0), rtol=1e-4, atol=2e-3)
    assert [name for name, _ in learner.named_parameters()] == (["keys"] if trained else [])


@pytest.mark.parametrize("parts", [1, 2])
def test_keys_are_means_of_features_as_clip_gives_them(parts):
    """A longer view weighs more, as in the source; features are handed out normalized all the same."""
    raw = (
        torch.randn(3, 4, parts * 8, generator=torch.Generator().manual_seed(3))
        * torch.tensor([1.0, 4.0, 9.0])[:, None, None]
    )
    features = FeatureSet(raw, torch.arange(4), ()).normalized(parts)
    torch.testing.assert_close(features.values.unflatten(-1, (parts, 8)).norm(dim=-1), torch.ones(3, 4, parts))
    for i in range(4):
        torch.testing.assert_close(features.mean()[i], (raw[0, i] + raw[1, i] + raw[2, i]) / 3)


def test_a_run_fills_its_cache_with_them(make):
    trainer = make("TipAdapter")
    trainer.train()
    images = next(iter(trainer.in_order(_views(trainer))))
    clip = trainer.network.clip
    raw = torch.stack([clip.encode_image(view).float() for view in images["img"].unflatten(0, (2, -1))])
    mean = (raw[0] + raw[1]) / 2
    learner = trainer.network.learner
    torch.testing.assert_close(learner.keys, mean / mean.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
    plain = torch.nn.functional.normalize(raw, dim=-1).mean(0)
    assert (learner.keys - torch.nn.functional.normalize(plain, dim=-1)).abs().max() > 1e-6  # lengths do matter here


@pytest.mark.parametrize(
    ("dataset", "beta_end", "alpha_end", "beta", "alpha", "epochs"),
    [
        ("ImageNet", 7, 3, 1, 1.17, 20),
        ("OxfordPets", 7, 3, 1, 1.17, 20),
        ("UCF101", 7, 3, 1, 3, 20),
        ("Caltech101", 12, 5, 1, 3, 20),
        ("DescribableTextures", 13, 13, 1, 2, 20),
        ("EuroSAT", 12, 10, 1, 2, 100),
        ("FGVCAircraft", 30, 30, 1, 5, 20),
        ("Food101", 10, 10, 1, 1.17, 20),
        ("OxfordFlowers", 50, 50, 1, 10, 20),
        ("StanfordCars", 20, 10, 1, 3, 20),
        ("SUN397", 12, 10, 1, 1.17, 20),
        ("ImageFolder", 7, 3, 1, 1.17, 20),  # ours: as ImageNet
    ],
)
def test_values_are_the_source_s(dataset, beta_end, alpha_end, beta, alpha, epochs):
    found = tip_values(dataset)
    assert (found.beta_end, found.alpha_end, found.beta, found.alpha) == (beta_end, alpha_end, beta, alpha)
    assert 20 * found.epoch_factor == epochs
    cfg = configured("vit_b16")
    grid = grid_of("tip", dataset)
    for axis, end, steps in ((grid.beta, beta_end, 200), (grid.alpha, alpha_end, 20)):
        want = [0.1 + (end - 0.1) * i / steps for i in range(steps)]
        assert axis.values() == pytest.approx(want)
    assert cfg.TRAINER.TIPADAPTER.ALPHA == cfg.TRAINER.TIPADAPTER.BETA == 0  # those of the dataset


def configured(file, *pairs, name="tip_adapter"):
    cfg = get_cfg_default()
    datasets.extend_cfg(cfg)
    trainers.extend_cfg(cfg)
    cfg.merge_from_file(f"configs/trainers/{name}/{file}.yaml")
    cfg.merge_from_list(list(pairs))
    return cfg


def _views(trainer):
    from dassl.data import DatasetWrapper
    from dassl.data.transforms import build_transform
    from trainers.features.views import SeededViews

    transform = build_transform(trainer.cfg, is_train=True)
    return SeededViews(DatasetWrapper(trainer.cfg, trainer.dm.dataset.train_x, transform=transform), 2, 1)


@pytest.fixture
def make_cfg(tmp_path, random_tiny):
    folders = {"TipAdapter": "tip_adapter", "TipAdapterF": "tip_adapter_f"}

    def make(name, *pairs, out="run"):
        cfg = configured("tiny", name=folders[name])
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / out), "DATASET.NAME", "Digits", "DATASET.NUM_SHOTS", 1])
        cfg.merge_from_list(["MODEL.BACKBONE.WEIGHTS", str(random_tiny), "USE_CUDA", False, "TEST.NO_TEST", True])
        cfg.merge_from_list([f"TRAINER.{name.upper()}.VIEWS", 2, "FEATURE_CACHE.USE", False, *pairs])
        cfg.freeze()
        return cfg

    return make


def test_what_was_used_is_recorded(make):
    trainer = make("TipAdapter")
    trainer.train()
    assert trainer.selected["beta"]["grid"] == "200 values from 0.1 to below 7"
    assert trainer.selected["alpha"]["grid"] == "20 values from 0.1 to below 3"
    assert [trainer.selected[name]["initial"] for name in ("alpha", "beta")] == [1.17, 1.0]
    own = make("TipAdapter", "TRAINER.TIPADAPTER.SEARCH_SCALE", (5.0, 2.0), "TRAINER.TIPADAPTER.ALPHA", 2.5, out="own")
    own.train()
    assert own.selected["beta"]["grid"] == "200 values from 0.1 to below 5"
    assert own.selected["alpha"]["initial"] == 2.5


def test_f_trains_with_the_dataset_s_values_for_its_number_of_epochs(make, monkeypatch):
    """Digits stand in for EuroSAT, whose keys the source trains five times as long, with beta 1 and alpha 2."""
    from trainers.tip_adapter import search as tip_search
    from trainers.tip_adapter import tip as tip_adapter

    monkeypatch.setitem(tip_search.TIP_VALUES, "Digits", tip_search.TIP_VALUES["EuroSAT"])
    trainer = make("TipAdapterF", "OPTIM.MAX_EPOCH", 2)
    assert trainer.max_epoch == 10
    seen = []
    logits = tip_adapter.tip_logits
    monkeypatch.setattr(tip_adapter, "tip_logits", lambda *a: seen.append(a[-2:]) or logits(*a))
    rates = []
    step = trainer.forward_backward
    trainer.forward_backward = lambda batch: rates.append(trainer.get_current_lr()) or step(batch)
    trainer.train()
    assert set(seen[:10]) == {(2.0, 1.0)}
    assert rates == pytest.approx([0.0005 * (1 + math.cos(math.pi * t / 10)) for t in range(10)])  # a step an epoch
    shorter = make("TipAdapterF", "OPTIM.MAX_EPOCH", 2, "TRAINER.TIPADAPTERF.EPOCH_FACTOR", 1, out="shorter")
    assert shorter.max_epoch == 2


def test_wrong_grids_are_named():
    for pairs, message in (
        (("GRID", "fine"), "GRID to be one of tip, tipx, overlap but got 'fine'"),
        (("SEARCH_SCALE", (0.05, 3.0)), r"SEARCH_SCALE to be \(\) or two numbers, above 0.1 and 0.1, but got"),
        (("SEARCH_STEP", (0, 20)), r"SEARCH_STEP to be \(\) or two whole numbers above 0 but got"),
        (("ALPHA", -1.0), "ALPHA to be a number, at least 0"),
    ):
        cfg = configured("tiny", f"TRAINER.TIPADAPTER.{pairs[0]}", pairs[1])
        with pytest.raises(ValueError, match=message):
            TipAdapter.read_settings(cfg)


def test_axes():
    assert Axis(0.1, 3, 20).values()[-1] == pytest.approx(0.1 + 2.9 * 19 / 20)
    assert Axis(0, 20, 5, closed=True).values() == pytest.approx([0, 5, 10, 15, 20])
    assert Axis(2, 5, 1).values() == Axis(2, 5, 1, closed=True).values() == [2]
    assert GRIDS["overlap"].beta.values()[-1] == GRIDS["overlap"].alpha.values()[-1] == 20


@pytest.mark.parametrize("first", ["beta", "alpha"])
def test_search_is_brute_force(data, first):
    f, w, keys, key_labels = data
    f, labels = unit(40, 24, seed=5), torch.arange(40) % 5
    alphas, betas = Axis(0.1, 3, 4).values(), Axis(0.1, 7, 5).values()
    best = (-1.0, None)
    points = [(a, b) for b in betas for a in alphas] if first == "beta" else [(a, b) for a in alphas for b in betas]
    for alpha, beta in points:
        logits = naive_tip(f, w, keys, key_labels, alpha, beta, 1.0)
        accuracy = 100 * float((logits.argmax(1) == labels).double().mean())
        if accuracy > best[0]:
            best = (accuracy, (alpha, beta))
    grid = grid_accuracy(f @ w.t(), f @ keys.t(), key_labels, labels, alphas, betas)
    choice = best_point(grid, alphas, betas, first=first)
    assert (choice.alpha, choice.beta) == best[1]
    assert choice.accuracy == pytest.approx(best[0])


def test_of_equals_the_first_of_the_source_s_loops_is_taken():
    accuracy = torch.zeros(2, 2, 3)  # [betas, gammas, alphas]
    accuracy[0, 1, 2] = accuracy[1, 0, 1] = accuracy[1, 1, 0] = 7
    axes = {"alphas": [10, 11, 12], "betas": [20, 21], "gammas": [30, 31]}
    assert best_point(accuracy, **axes, first="beta")[:3] == (12, 20, 31)
    assert best_point(accuracy, **axes, first="alpha")[:3] == (10, 21, 31)


def test_a_part_of_the_classes_keeps_their_keys(data, make_clip, names):
    f, w, keys, labels = data
    clip = make_clip()
    learner = TipLearner(clip, names, w, n=11, alpha=1.0, beta=5.5, trained=True)
    with torch.no_grad():
        learner.keys.copy_(keys)
        learner.key_labels.copy_(labels)
    part = TipLearner(clip, [names[3], names[1]], w[[3, 1]], n=0, alpha=1.0, beta=5.5, trained=True)
    part.take(learner.state_dict())
    torch.testing.assert_close(part(f), learner(f)[:, [3, 1]])
    with pytest.raises(ValueError, match="classes that were trained on"):
        TipLearner(clip, ["desert"], w[:1], n=0, alpha=1.0, beta=5.5, trained=True).take(learner.state_dict())

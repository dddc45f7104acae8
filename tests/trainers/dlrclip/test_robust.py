"""The robust head: its formula, what it is fitted to, and runs with it."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from trainers.dlrclip import robust
from trainers.dlrclip.pseudo_shifts import SHIFTS, shifted
from trainers.dlrclip.robust import SIGNS, Evidence, RobustMixture, neighbor_distance

from .conftest import NAMES, gone_on_after_one_epoch, heads_on_test

ROBUST = ("TRAINER.DLRCLIP.FUSION", "robust")
NO_TEST = ("TEST.NO_TEST", True)
HEADS = ("clip", "cma", "glr", "final", "fused", "robust")


def unit(*size):
    return F.normalize(torch.randn(*size), dim=-1)


def world(n=60, classes=4, good="final", side=1.0):
    """A group of images on one side of the sphere; one branch knows the labels and the other guesses, more loudly."""
    labels = torch.randint(classes, (n,))
    known, guessed = 8 * F.one_hot(labels, classes).float(), 16 * torch.rand(n, classes)
    clip, final = (guessed, known) if good == "final" else (known, guessed)
    return Evidence(F.normalize(torch.randn(n, 6) + 3 * side, dim=1), clip, final, labels)


def naive_signs(row, bank, clip, final, typical):
    """One image's signs, in plain numbers."""
    near = sorted(1 - float(row @ other) for other in bank)[:5]
    p, q = clip.softmax(0), final.softmax(0)
    leads = [
        math.asinh(float(v.sort(descending=True).values[0] - v.sort(descending=True).values[1])) for v in (clip, final)
    ]
    entropies = [-float((x * x.log()).sum()) / math.log(len(x)) for x in (p, q)]
    agreement = float((p * q).sqrt().sum())
    return [math.log(sum(near) / len(near) / typical), *entropies, agreement, *leads]


def test_formula_against_naive():
    torch.manual_seed(0)
    mixture, bank = RobustMixture(6), unit(9, 6)
    mixture.remember(bank)
    kept = bank.half().float()
    own = [sum(sorted(1 - float(a @ b) for j, b in enumerate(kept) if j != i)[:5]) / 5 for i, a in enumerate(kept)]
    assert mixture.typical.item() == pytest.approx(sorted(own)[4], rel=1e-4)
    frozen, clip, final = unit(7, 6), 5 * torch.rand(7, 4), 5 * torch.rand(7, 4)
    want = torch.tensor(
        [naive_signs(*rows, mixture.typical.item()) for rows in zip(frozen, [kept] * 7, clip, final, strict=True)]
    )
    torch.testing.assert_close(mixture.signs(frozen, clip, final), want, rtol=1e-4, atol=1e-4)
    mixture.centre.fill_(0.3)
    mixture.spread.fill_(0.1)
    mixture.coefficients.copy_(torch.linspace(-0.4, 0.6, 7))
    x = ((want - 0.3) / 0.1).clamp(-3, 3)
    r = torch.sigmoid(-0.4 + (x * torch.linspace(-0.4, 0.6, 7)[1:]).sum(1, keepdim=True))
    logits, trust = mixture(frozen, clip, final)
    torch.testing.assert_close(trust, r, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits, r * final + (1 - r) * clip, rtol=1e-3, atol=1e-3)


def test_until_it_is_fitted_both_branches_count_alike():
    torch.manual_seed(0)
    clip, final = torch.rand(3, 4), torch.rand(3, 4)
    logits, trust = RobustMixture(6)(unit(3, 6), clip, final)
    assert torch.equal(trust, torch.full((3, 1), 0.5))
    torch.testing.assert_close(logits, (clip + final) / 2)


def test_one_training_image_and_one_class():
    mixture = RobustMixture(6)
    mixture.remember(unit(1, 6))
    logits, trust = mixture(unit(2, 6), torch.rand(2, 1), torch.rand(2, 1))
    assert torch.isfinite(logits).all() and torch.isfinite(trust).all()


def test_the_fit_follows_the_branch_that_is_right_and_the_distance_that_tells():
    torch.manual_seed(0)
    near, far = world(good="final"), world(good="clip", side=-1.0)
    mixture = RobustMixture(6)
    mixture.remember(world().frozen)
    mixture.fit([near, far])
    right = [(mixture(*group[:3])[0].argmax(1) == group.labels).float().mean().item() for group in (near, far)]
    trust = [mixture(*group[:3])[1].mean().item() for group in (near, far)]
    assert min(right) > 0.9
    assert trust[0] > 0.6 > 0.4 > trust[1]
    assert mixture.chosen()["distance"] < 0
    assert int(mixture.count) == 60
    again = RobustMixture(6)
    again.remember(mixture.bank)
    again.fit([near, far])
    assert torch.equal(again.coefficients, mixture.coefficients)


def test_the_known_world_weighs_as_much_as_all_others():
    torch.manual_seed(0)
    group, others = world(good="final"), [world(good="clip") for _ in range(3)]
    one, many = RobustMixture(6), RobustMixture(6)
    one.fit([group, Evidence(*map(torch.cat, zip(*others, strict=True)))])
    many.fit([group, *others])
    torch.testing.assert_close(one.coefficients, many.coefficients, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("chunk", [3, 1024])
def test_distance_leaves_the_image_itself_out(monkeypatch, chunk):
    monkeypatch.setattr(robust, "CHUNK", chunk)
    torch.manual_seed(0)
    bank = unit(8, 6)
    want = [sorted(1 - float(a @ b) for j, b in enumerate(bank) if j != i)[:5] for i, a in enumerate(bank)]
    torch.testing.assert_close(neighbor_distance(bank, bank, itself=True), torch.tensor(want).mean(1))


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts_change_images_and_are_the_same_each_time(name):
    torch.manual_seed(0)
    images = torch.rand(3, 3, 32, 32)
    once = shifted(images, name, 1)
    assert once.shape == images.shape and once.min() >= 0 and once.max() <= 1
    assert torch.equal(once, shifted(images, name, 1))
    assert not any(torch.allclose(a, b, atol=0.02) for a, b in zip(once, images, strict=True))
    plain = torch.full((1, 3, 32, 32), 0.5)
    assert torch.isfinite(shifted(plain, name)).all()


class TestRuns:
    def test_training_is_the_same_and_the_checkpoint_holds_the_head(self, make, tmp_path):
        plain = make(*NO_TEST, "SEED", 1, out="plain")
        plain.train()
        trainer = make(*ROBUST, "SEED", 1, "TRAINER.DLRCLIP.HEAD", "robust")
        trainer.train()
        want, got = plain.network.learner.state_dict(), trainer.network.learner.state_dict()
        assert all(torch.equal(got[name], want[name]) for name in want if name != "_extra_state")
        results = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert tuple(results["test"]["heads"]) == HEADS
        assert results["accuracy"] == results["test"]["heads"]["robust"]["accuracy"]
        chosen = results["selected"]["robust"]
        assert set(chosen["value"]) == {"bias", *SIGNS} and chosen["n"] == 10
        assert chosen["on"] == "val as it is and under 8 corruptions"
        assert results["selected"]["beta"] == plain.selected["beta"]
        assert trainer.network.learner.robust.bank.shape == (20, trainer.network.clip.embed_dim)
        loaded = make(*ROBUST, out="again")
        loaded.load_model(str(tmp_path / "run"))
        a, b = heads_on_test(trainer), heads_on_test(loaded)
        assert all(torch.equal(a[head], b[head]) for head in HEADS)
        assert loaded.selected["robust"] == trainer.selected["robust"]
        for pairs, folder in (((), "run"), (ROBUST, "plain")):
            with pytest.raises(ValueError, match="made with the same settings"):
                make(*pairs, out="other").load_model(str(tmp_path / folder))

    def test_is_fitted_to_validation_images_only(self, make, monkeypatch):
        class Untouchable:
            def __iter__(self):
                raise AssertionError("test images were read")

        trainer = make(*ROBUST, *NO_TEST, "OPTIM.MAX_EPOCH", 1)
        trainer.test_loader = Untouchable()
        seen = []
        fit = RobustMixture.fit
        monkeypatch.setattr(RobustMixture, "fit", lambda self, groups: (seen.extend(groups), fit(self, groups)))
        trainer.train()
        assert len(seen) == 1 + len(SHIFTS)
        logits, labels = trainer._collect(trainer.val_loader)
        assert all(torch.equal(group.labels, labels) for group in seen)
        torch.testing.assert_close(seen[0].clip, logits["clip"])
        torch.testing.assert_close(seen[0].final, logits["final"])
        assert not any(torch.allclose(group.clip, logits["clip"]) for group in seen[1:])

    def test_without_validation_images_it_is_the_mean_of_both(self, make, dataset):
        dataset(val=0)
        trainer = make(*ROBUST, *NO_TEST, "OPTIM.MAX_EPOCH", 1)
        trainer.train()
        assert trainer.selected["robust"]["n"] == 0
        assert "no validation set" in trainer.selected["robust"]["on"]
        heads = heads_on_test(trainer)
        torch.testing.assert_close(heads["robust"], (heads["final"] + heads["clip"]) / 2)

    def test_other_classes_columns_and_resuming(self, make, dataset, tmp_path):
        pairs = (*ROBUST, "OPTIM.MAX_EPOCH", 2, "TRAIN.CHECKPOINT_FREQ", 1, "SEED", 1, *NO_TEST)
        trainer = make(*pairs)
        trainer.train()
        want = trainer.network.learner.state_dict()
        got = gone_on_after_one_epoch(make, pairs, tmp_path).network.learner.state_dict()
        assert all(torch.equal(got[name], want[name]) for name in want)

        images = torch.stack([item["img"] for item in trainer.test_loader.dataset])
        trainer.set_model_mode("eval")
        full = trainer.model_report(images)
        dataset(names=[NAMES[1], NAMES[3]], class_indices=[1, 3])
        part = make(*ROBUST, out="part")
        part.load_model(str(tmp_path / "run"))
        part.set_model_mode("eval")
        cut = part.model_report(images)
        torch.testing.assert_close(cut["heads"]["robust"], full["heads"]["robust"][:, [1, 3]])
        torch.testing.assert_close(cut["values"]["trust"], full["values"]["trust"])
        part.bind_classes(["airport", "bridge", "desert"])
        new = part.model_report(images)
        r = new["values"]["trust"]
        torch.testing.assert_close(new["heads"]["robust"], r * new["heads"]["final"] + (1 - r) * new["heads"]["clip"])

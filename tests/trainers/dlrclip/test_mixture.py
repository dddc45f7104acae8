"""The third level of DLR-CLIP: prototype classifiers, and the mixture of all branches."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trainers.dlrclip.mixture import Mixture
from trainers.dlrclip.prototypes import (
    KAPPAS,
    RHOS,
    TEMPERATURES,
    UNKNOWN,
    Gaussians,
    PatchPrototypes,
    Prototypes,
    best_temperature,
    with_another,
)

from .conftest import NAMES, gone_on_after_one_epoch, heads_on_test

MIXTURE = ("TRAINER.DLRCLIP.FUSION", "mixture")
NO_TEST = ("TEST.NO_TEST", True)
NO_PROTO = tuple(x for end in ("", "_PATCH", "_CMA") for x in (f"TRAINER.DLRCLIP.MIXTURE.PROTO{end}", False))
V, C, E = 3, 4, 6


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def images(per_class=(3, 3, 3, 3)):
    """Features [V, N, E] of images around class centers, their labels, and text features that know a little of them."""
    labels = torch.tensor([k for k, n in enumerate(per_class) for _ in range(n)])
    centers = unit(C, E)
    features = F.normalize(centers[labels] + 0.4 * torch.randn(V, len(labels), E, dtype=torch.float64), dim=-1)
    return features, labels, F.normalize(centers + 0.3 * torch.randn(C, E, dtype=torch.float64), dim=-1)


def naive_said(x, labels, text):
    """What the text says of each class, image by image and class by class."""
    present = [k for k in range(C) if (labels == k).any()]
    means = {k: np.mean([x[i] for i in range(len(x)) if labels[i] == k], axis=0) for k in present}
    center, middle = np.mean(list(means.values()), axis=0), np.mean([text[k] for k in present], axis=0)
    above = sum(float((means[k] - center) @ (text[k] - middle)) for k in present)
    below = sum(float((text[k] - middle) @ (text[k] - middle)) for k in present)
    return [center + max(above / below, 0) * (text[k] - middle) for k in range(C)]


def naive(features, labels, text, kappa, rho, left_out=None):
    """The classifier (prototypes, precision) by loops; or that without the image `left_out` and its class's scatter."""
    features, labels, text = features.numpy(), labels.numpy(), text.numpy()
    x, said = features.mean(0), naive_said(features.mean(0), labels, text)

    def prototype(k, without):
        rows = [x[i] for i in range(len(x)) if labels[i] == k and i not in without]
        return (sum(rows, np.zeros(E)) + kappa * said[k]) / (len(rows) + kappa)

    scatter = np.zeros((E, E))
    for v, i in itertools.product(range(len(features)), range(len(x))):
        away = features[v, i] - x[i]
        scatter += np.outer(away, away) / (len(features) * len(x))
    full = scatter.copy()
    for i in range(len(x)):
        away = x[i] - prototype(labels[i], {i})
        full += np.outer(away, away) / len(x)
        if left_out is None or labels[i] != labels[left_out]:
            scatter += np.outer(away, away) / len(x)
    covariance = (1 - rho) * scatter + rho * np.trace(full) / E * np.eye(E)
    gone = set() if left_out is None else {left_out}
    return np.stack([prototype(k, gone) for k in range(C)]), np.linalg.inv(covariance)


def distances(x, means, precision):
    return np.array([-0.5 * (x - m) @ precision @ (x - m) for m in means])


@pytest.mark.parametrize("per_class", [(3, 3, 3, 3), (1, 1, 1, 1), (4, 1, 0, 2)])
def test_prototypes_against_loops(per_class):
    torch.manual_seed(0)
    features, labels, text = images(per_class)
    gaussians = Gaussians(features, labels, text)
    points = list(gaussians.grid())
    assert [(p.kappa, p.rho) for p in points] == list(itertools.product(KAPPAS, RHOS))
    query = unit(5, E)
    for point in (points[0], points[8], points[-1]):
        means, precision = naive(features, labels, text, point.kappa, point.rho)
        np.testing.assert_allclose(point.means, means, atol=1e-10)
        np.testing.assert_allclose(point.precision, precision, rtol=1e-7, atol=1e-7)
        weight, bias = point.linear()
        got = torch.softmax(query @ weight.t() + bias, dim=1)
        want = torch.softmax(torch.tensor(np.stack([distances(q, means, precision) for q in query.numpy()])), dim=1)
        torch.testing.assert_close(got, want)
        left = gaussians.left_out(point)
        for i, x in enumerate(features.mean(0).numpy()):
            want = distances(x, *naive(features, labels, text, point.kappa, point.rho, left_out=i))
            np.testing.assert_allclose(left[i], want, rtol=1e-6, atol=1e-8)


def naive_loss(logits, labels):
    """The negative log-likelihood of all images, and of 0.05 images of any class."""
    p = torch.softmax(logits, dim=1).tolist()
    known = -sum(math.log(row[label]) for row, label in zip(p, labels.tolist(), strict=True))
    return known - UNKNOWN * sum(math.log(value) for row in p for value in row) / (len(p) * len(p[0]))


def naive_temperature(logits, labels):
    losses = [naive_loss(factor * logits, labels) for factor in TEMPERATURES]
    return TEMPERATURES[losses.index(min(losses))]


def test_all_right_does_not_mean_certain():
    torch.manual_seed(4)
    labels = torch.arange(C)
    logits = 5 * F.one_hot(labels, C).double() + torch.randn(C, C)
    assert best_temperature(logits, labels)[0] == naive_temperature(logits, labels) < max(TEMPERATURES)


def test_the_grid_is_averaged_by_likelihood_on_validation_images():
    torch.manual_seed(1)
    features, labels, text = images()
    seen, known = unit(7, E), torch.randint(C, (7,))
    classifier = Prototypes(C, E)
    assert classifier.fit(features, labels, text, (seen, known)) is None
    logits, scores = [], []
    for point in Gaussians(features, labels, text).grid():
        weight, bias = point.linear()
        raw = seen @ weight.t() + bias
        factor = naive_temperature(raw, known)
        scores.append(-7 * float(F.cross_entropy(factor * raw, known)))
        logits.append(factor * raw)
    share = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
    want = sum(s * value for s, value in zip(share, logits, strict=True))
    torch.testing.assert_close(classifier(seen.float()), want.float(), rtol=1e-4, atol=1e-4)
    assert int(classifier.count) == 7 and min(KAPPAS) < float(classifier.kappa) < max(KAPPAS)


def test_without_validation_images_all_points_count_the_same():
    torch.manual_seed(2)
    features, labels, text = images()
    classifier = Prototypes(C, E)
    left_out = classifier.fit(features, labels, text, None)
    gaussians, want, want_left = Gaussians(features, labels, text), 0.0, 0.0
    for point in gaussians.grid():
        raw = gaussians.left_out(point)
        factor, _ = best_temperature(raw, labels)
        weight, bias = point.linear()
        want = want + factor * (features[0] @ weight.t() + bias) / (len(KAPPAS) * len(RHOS))
        want_left = want_left + factor * raw / (len(KAPPAS) * len(RHOS))
    torch.testing.assert_close(classifier(features[0].float()), want.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left_out, want_left)
    assert int(classifier.count) == 0 and float(classifier.kappa) == pytest.approx(sum(KAPPAS) / len(KAPPAS))


def test_an_image_alone_in_its_class_tells_it_by_its_absence_and_is_not_asked():
    torch.manual_seed(2)
    features, labels, text = images((3, 1, 4, 1))
    tested = (labels == 0) | (labels == 2)
    assert torch.equal(with_another(labels), tested) and with_another(torch.arange(C)).all()
    classifier = Prototypes(C, E)
    classifier.fit(features, labels, text, None)
    gaussians, want = Gaussians(features, labels, text), 0.0
    for point in gaussians.grid():
        factor, _ = best_temperature(gaussians.left_out(point)[tested], labels[tested])
        weight, bias = point.linear()
        want = want + factor * (features[0] @ weight.t() + bias) / (len(KAPPAS) * len(RHOS))
    torch.testing.assert_close(classifier(features[0].float()), want.float(), rtol=1e-4, atol=1e-4)


def test_patches_are_centered_and_normalized_block_by_block():
    torch.manual_seed(6)
    features, labels, _ = images()
    seen, known, query = 3 * torch.randn(7, E), torch.randint(C, (7,)), 3 * torch.randn(5, E)
    features = 2 + 3 * features
    mean = features.numpy().mean((0, 1))

    def prepared(x):
        parts = np.split(x.numpy() - mean, [2], axis=-1)
        return torch.tensor(np.concatenate([p / np.linalg.norm(p, axis=-1, keepdims=True) for p in parts], axis=-1))

    classifier = PatchPrototypes(C, [2, E - 2])
    assert classifier.fit(features.float(), labels, None, (seen, known)) is None
    plain = Prototypes(C, E)
    plain.fit(prepared(features), labels, torch.zeros(C, E), (prepared(seen), known))
    torch.testing.assert_close(classifier(query), plain(prepared(query)), rtol=1e-3, atol=1e-3)
    means = torch.stack([prepared(features).mean(0)[labels == k].mean(0) for k in range(C)])
    said = Gaussians(prepared(features), labels, torch.zeros(C, E)).said
    torch.testing.assert_close(said, means.mean(0).expand(C, E).double())


def test_no_image_of_a_pair_tells_the_direction_of_the_other():
    """By leaving one image out, classes of two that are told apart by chance alone look no better than chance."""
    torch.manual_seed(7)
    labels = torch.arange(20).repeat(2)
    features = F.normalize(torch.randn(1, 40, 64, dtype=torch.float64), dim=-1)
    classifier = Prototypes(20, 64)
    left_out = classifier.fit(features, labels, torch.zeros(20, 64), None)
    assert float((left_out.argmax(1) == labels).double().mean()) < 0.2


def test_prototypes_need_an_image():
    with pytest.raises(ValueError, match="at least one training image"):
        Gaussians(torch.zeros(1, 0, E), torch.zeros(0, dtype=torch.long), unit(C, E))


def branches(n=40):
    labels = torch.randint(C, (n,))
    right = F.one_hot(labels, C).double()
    return {"clip": 2 * torch.randn(n, C, dtype=torch.float64), "good": 3 * right + torch.randn(n, C)}, labels


def starting_point(mixture, logits, labels):
    """Each branch's temperature, times its share of the whole."""
    found, means = [], []
    for name in mixture.branches:
        factor = naive_temperature(logits[name], labels)
        p = torch.softmax(factor * logits[name], dim=1)
        means.append(math.prod(float(p[i, label]) for i, label in enumerate(labels)) ** (1 / len(labels)))
        found.append(factor)
    return [factor * mean**3 / sum(m**3 for m in means) for factor, mean in zip(found, means, strict=True)]


class TestMixture:
    def test_is_the_first_branch_until_it_is_fitted(self):
        logits, _ = branches()
        torch.testing.assert_close(Mixture(("clip", "good"), 3.0)(logits), logits["clip"].float())

    @pytest.mark.parametrize("ridge", [0.1, 3.0])
    def test_weights_are_the_best_of_a_fine_grid(self, ridge):
        torch.manual_seed(3)
        logits, labels = branches()
        mixture = Mixture(("clip", "good"), ridge)
        mixture.fit(logits, labels)
        start = starting_point(mixture, logits, labels)

        def loss(a, b):
            mixed = a * start[0] * logits["clip"] + b * start[1] * logits["good"]
            return naive_loss(mixed, labels) + ridge * ((a - 1) ** 2 + (b - 1) ** 2)

        steps = [i / 25 for i in range(1, 100)]
        best = min(itertools.product(steps, steps), key=lambda pair: loss(*pair))
        mixed = sum(a * s * logits[name] for a, s, name in zip(best, start, mixture.branches, strict=True))
        factor = naive_temperature(logits["clip"], labels)
        gain = float(F.cross_entropy(factor * logits["clip"], labels) - F.cross_entropy(mixed, labels)) * len(labels)
        belief = 1 / (1 + math.exp(1 - gain))
        assert belief > 0.9
        got = [mixture.weights[0] - (1 - belief) * factor, mixture.weights[1]]
        got = [float(weight) / belief / first for weight, first in zip(got, start, strict=True)]
        assert got == pytest.approx(best, abs=0.05)
        assert loss(*got) <= loss(*best) + 1e-6
        assert int(mixture.count) == 40 and not bool(mixture.left_out)

    def test_a_strong_ridge_keeps_the_start(self):
        logits, labels = branches()
        mixture = Mixture(("clip", "good"), 1e8)
        mixture.fit(logits, labels)
        start = starting_point(mixture, logits, labels)
        mixed = sum(weight * logits[name] for weight, name in zip(start, mixture.branches, strict=True))
        factor = naive_temperature(logits["clip"], labels)
        gain = float(F.cross_entropy(factor * logits["clip"], labels) - F.cross_entropy(mixed, labels)) * len(labels)
        belief = 1 / (1 + math.exp(1 - gain))
        start = [belief * weight for weight in start]
        start[0] += (1 - belief) * factor
        assert mixture.weights.tolist() == pytest.approx(start, rel=1e-4)

    def test_zero_shot_it_is_where_the_others_are_worse(self):
        torch.manual_seed(5)
        logits, labels = branches()
        logits = {"clip": logits["good"], "good": torch.randn_like(logits["clip"])}
        mixture = Mixture(("clip", "good"), 1e8)
        mixture.fit(logits, labels)
        factor = naive_temperature(logits["clip"], labels)
        assert mixture.weights.tolist() == pytest.approx([factor, 0], rel=0.02, abs=1e-3)

    def test_branches_that_are_not_given_weigh_nothing_and_may_share(self):
        logits, labels = branches()
        mixture = Mixture(("clip", "good", "other"), 1.0)
        mixture.fit(logits, labels, left_out=True)
        before = mixture.chosen()
        assert before["other"] == 0 and bool(mixture.left_out)
        mixture.share("good", "none")
        assert mixture.chosen() == before
        mixture.share("good", "other")
        assert mixture.chosen() == {"clip": before["clip"], **dict.fromkeys(("good", "other"), before["good"] / 2)}

    def test_refuses_nothing(self):
        with pytest.raises(ValueError, match="images and branches"):
            Mixture(("clip",), 1.0).fit({}, torch.zeros(0, dtype=torch.long))


class TestRuns:
    HEADS = ("clip", "cma", "glr", "final", "fused", "proto", "proto_patch", "proto_cma", "mixed")

    def test_the_published_heads_stay_and_the_checkpoint_holds_the_others(self, make, tmp_path):
        plain = make("SEED", 1, out="plain")
        plain.train()
        trainer = make(*MIXTURE, "SEED", 1, "TRAINER.DLRCLIP.HEAD", "mixed")
        trainer.train()
        want, got = plain.network.learner.state_dict(), trainer.network.learner.state_dict()
        assert all(torch.equal(got[name], want[name]) for name in want if name != "_extra_state")
        results = json.loads((tmp_path / "run" / "metrics.json").read_text())
        published = json.loads((tmp_path / "plain" / "metrics.json").read_text())["test"]["heads"]
        assert tuple(results["test"]["heads"]) == self.HEADS
        assert {head: results["test"]["heads"][head] for head in published} == published
        assert results["accuracy"] == results["test"]["heads"]["mixed"]["accuracy"]
        chosen = results["selected"]["mixture"]
        assert set(chosen["value"]) == {"clip", "cma", "glr", "proto", "proto_patch", "proto_cma"}
        assert (chosen["on"], chosen["n"]) == ("val", 10)
        heads = heads_on_test(trainer)
        mixed = sum(weight * heads[name] for name, weight in chosen["value"].items())
        torch.testing.assert_close(heads["mixed"], mixed)
        loaded = make(*MIXTURE, out="again")
        loaded.load_model(str(tmp_path / "run"))
        again = heads_on_test(loaded)
        assert all(torch.equal(heads[head], again[head]) for head in self.HEADS)
        assert loaded.selected["mixture"] == trainer.selected["mixture"]
        with pytest.raises(ValueError, match="made with the same settings"):
            make(out="other").load_model(str(tmp_path / "run"))

    def test_is_fitted_to_training_and_validation_images_only(self, make):
        class Untouchable:
            def __iter__(self):
                raise AssertionError("test images were read")

        trainer = make(*MIXTURE, *NO_TEST, "OPTIM.MAX_EPOCH", 1)
        trainer.test_loader = Untouchable()
        trainer.train()
        assert trainer.selected["mixture"]["n"] == 10

    def test_without_validation_images_training_images_are_left_out(self, make, dataset):
        dataset(val=0)
        trainer = make(*MIXTURE, *NO_TEST, "OPTIM.MAX_EPOCH", 1)
        trainer.train()
        chosen = trainer.selected["mixture"]
        assert chosen["on"] == "training images, each left out in turn (no validation set)" and chosen["n"] == 20
        assert chosen["value"]["cma"] == chosen["value"]["glr"] == 0
        assert chosen["value"]["proto"] == chosen["value"]["proto_cma"] > 0 and chosen["value"]["proto_patch"] > 0

    def test_without_validation_images_and_a_second_image_patches_get_no_weight(self, make, dataset):
        """Left out, an image's class is the one without an image: patches would seem to know it."""
        dataset(val=0, train=1)
        trainer = make(*MIXTURE, *NO_TEST, "OPTIM.MAX_EPOCH", 1)
        trainer.train()
        chosen = trainer.selected["mixture"]
        assert chosen["n"] == len(NAMES) and chosen["value"]["proto_patch"] == 0 < chosen["value"]["proto"]

    def test_switches(self, make):
        off = {"PROTO": "proto", "PROTO_PATCH": "proto_patch", "PROTO_CMA": "proto_cma"}
        for key, head in off.items():
            learner = make(*MIXTURE, f"TRAINER.DLRCLIP.MIXTURE.{key}", False, out=key).network.learner
            assert set(learner.prototypes) == set(off.values()) - {head}
            assert bool(learner.patch_blocks) == (head != "proto_patch")

    def test_without_validation_images_and_prototypes_it_is_zero_shot(self, make, dataset):
        dataset(val=0)
        trainer = make(*MIXTURE, *NO_PROTO, *NO_TEST, "OPTIM.MAX_EPOCH", 1)
        trainer.train()
        assert "zero-shot" in trainer.selected["mixture"]["on"]
        heads = heads_on_test(trainer)
        torch.testing.assert_close(heads["mixed"], heads["clip"])

    @pytest.mark.parametrize("mode", ["dense", "shared"])
    def test_other_classes_columns_and_resuming(self, make, dataset, tmp_path, mode):
        pairs = (*MIXTURE, "TRAINER.DLRCLIP.GLR_MODE", mode, "TRAIN.CHECKPOINT_FREQ", 1, "SEED", 1, *NO_TEST)
        trainer = make(*pairs)
        trainer.train()
        want = trainer.network.learner.state_dict()
        got = gone_on_after_one_epoch(make, pairs, tmp_path).network.learner.state_dict()
        assert all(torch.equal(got[name], want[name]) for name in want)

        seen = torch.stack([item["img"] for item in trainer.test_loader.dataset])
        trainer.set_model_mode("eval")
        full = trainer.model_report(seen)["heads"]
        dataset(names=[NAMES[1], NAMES[3]], class_indices=[1, 3])
        part = make(*MIXTURE, "TRAINER.DLRCLIP.GLR_MODE", mode, out="part")
        part.load_model(str(tmp_path / "run"))
        part.set_model_mode("eval")
        cut = part.model_report(seen)["heads"]
        for head in ("proto", "proto_patch", "proto_cma", "mixed"):
            torch.testing.assert_close(cut[head], full[head][:, [1, 3]])
        part.bind_classes(["airport", "bridge", "desert"])
        new = part.model_report(seen)["heads"]
        assert set(new) == {"clip", "cma", "glr", "final", "fused", "mixed"}
        torch.testing.assert_close(new["mixed"], new["clip"])

    def test_without_adapter_nothing_is_trained(self, make, tmp_path):
        off = ("TRAINER.DLRCLIP.CMA", False, "TRAINER.DLRCLIP.GLR", False, "TRAINER.DLRCLIP.HEAD", "mixed")
        trainer = make(*MIXTURE, *off, "OPTIM.MAX_EPOCH", 50, "SEED", 1)
        trainer.train()
        assert trainer.max_epoch == 1 and not list(trainer.network.learner.parameters())
        results = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert set(results["selected"]["mixture"]["value"]) == {"clip", "proto", "proto_patch"}
        loaded = make(*MIXTURE, *off, out="again")
        loaded.load_model(str(tmp_path / "run"))
        a, b = heads_on_test(trainer), heads_on_test(loaded)
        assert "proto_cma" not in a and all(torch.equal(a[head], b[head]) for head in a)

    @pytest.mark.parametrize("views", [0, 2])
    def test_views_are_seeded(self, make, views):
        runs = []
        for out in ("a", "b"):
            trainer = make(*MIXTURE, "TRAINER.DLRCLIP.MIXTURE.VIEWS", views, "SEED", 1, *NO_TEST, out=out)
            trainer.calibrate()
            runs.append(trainer.network.learner.state_dict())
        fitted = [name for name in runs[0] if name.startswith(("prototypes.", "mixture."))]
        assert fitted and all(torch.equal(runs[0][name], runs[1][name]) for name in fitted)
        assert math.isfinite(float(runs[0]["prototypes.proto.kappa"]))

    def test_settings_that_do_not_go_together(self, make):
        off = ("TRAINER.DLRCLIP.CMA", False, "TRAINER.DLRCLIP.GLR", False)
        with pytest.raises(ValueError, match="nothing would be learnt"):
            make(*off)
        with pytest.raises(ValueError, match="nothing would be learnt"):
            make(*off, *MIXTURE, *NO_PROTO)
        with pytest.raises(ValueError, match="needs FUSION mixture"):
            make("TRAINER.DLRCLIP.HEAD", "mixed")

    @pytest.mark.parametrize("free", [False, True])
    def test_what_the_cache_gives_is_what_images_give(self, make, tmp_path, free):
        off = ("TRAINER.DLRCLIP.CMA", False, "TRAINER.DLRCLIP.GLR", False) if free else ()
        pairs = (*MIXTURE, *off, "OPTIM.MAX_EPOCH", 1, "SEED", 1)
        cache = ("FEATURE_CACHE.USE", True, "FEATURE_CACHE.DIR", str(tmp_path / "features"))
        heads = []
        for number, more in enumerate((("FEATURE_CACHE.USE", False), cache, cache)):
            trainer = make(*pairs, *more, out=f"run{number}")
            trainer.train()
            heads.append(heads_on_test(trainer))
        assert "proto_patch" in heads[0]
        for head in heads[0]:
            assert torch.equal(heads[0][head], heads[1][head]) and torch.equal(heads[0][head], heads[2][head])

    def test_known_features_need_their_patches(self, make):
        network = make(*MIXTURE).network
        network.eval()
        seen = torch.rand(2, 3, 32, 32)
        found = network.image_features(seen)
        known = network.report(seen, found.frozen())["heads"]
        assert all(torch.equal(known[head], value) for head, value in network.report(seen)["heads"].items())
        with pytest.raises(ValueError, match="mean patches beside them"):
            network.report(seen, found.clip)
        with pytest.raises(ValueError, match="Expected images"):
            network.report(None)

    def test_a_report_for_figures_has_no_patches(self, make):
        trainer = make(*MIXTURE)
        trainer.set_model_mode("eval")
        assert set(trainer.model_report(torch.rand(2, 3, 32, 32))["features"]) == {"clip", "cma"}

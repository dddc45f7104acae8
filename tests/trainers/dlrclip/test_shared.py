"""The class-agnostic refiner and fusion gate: formulas, symmetry, and runs on other classes than those trained on."""

import math

import pytest
import torch

from trainers.dlrclip.shared import (
    SharedFusion,
    SharedRefiner,
    branch_statistics,
    fusion_statistics,
    neighbor_weights,
)

from .conftest import NAMES, heads_on_test

MODE = ("TRAINER.DLRCLIP.GLR_MODE", "shared")
NO_TEST = ("TEST.NO_TEST", True)
HEADS = ("clip", "cma", "glr", "final", "fused")


def softmax(row):
    top = max(row)
    e = [math.exp(x - top) for x in row]
    return [x / sum(e) for x in e]


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0) / math.log(max(len(p), 2))


def naive_neighbors(text, t=0.05):
    rows = []
    for i, a in enumerate(text):
        others = [j for j in range(len(text)) if j != i]
        weights = softmax([float(a @ text[j]) / t for j in others]) if others else []
        rows.append([0.0] * len(text))
        for j, weight in zip(others, weights, strict=True):
            rows[i][j] = weight
    return torch.tensor(rows)


def naive_statistics(row, near):
    """One image's logits (list), S -> the six statistics of each class."""
    p, mean, size = softmax(row), sum(row) / len(row), len(row)
    out = []
    for c in range(size):
        others = [row[j] for j in range(size) if j != c]
        rival = max(others) if others else row[c]
        around = sum(float(near[c, j]) * row[j] for j in range(size)) if others else row[c]
        leads = [math.asinh(row[c] - other) for other in (rival, mean, around)]
        out.append([p[c], *leads, sum(float(near[c, j]) * p[j] for j in range(size)), entropy(p)])
    return out


def layer(module, x):
    y = x @ module.weight.T
    return y if module.bias is None else y + module.bias


def refined(glr, projection, recalibration, x):
    z = layer(projection, x)
    z = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    return z * torch.sigmoid(layer(recalibration.excite, layer(recalibration.squeeze, z).clamp(min=0)))


def naive_glr(glr, clip_logits, cma_logits, near):
    """Image by image and class by class over the refiner's parameters."""
    rows, alphas = [], []
    for z, y in zip(clip_logits.tolist(), cma_logits.tolist(), strict=True):
        p, q = softmax(z), softmax(y)
        agreement = sum(math.sqrt(a * b) for a, b in zip(p, q, strict=True))
        lead = [(b - sum(y) / len(y)) - (a - sum(z) / len(z)) for a, b in zip(z, y, strict=True)]
        of_cma = [[*s, math.asinh(x), agreement] for s, x in zip(naive_statistics(y, near), lead, strict=True)]
        f_clip = [
            refined(glr, glr.project_clip, glr.recalibrate_clip, torch.tensor(s)) for s in naive_statistics(z, near)
        ]
        f_cma = [refined(glr, glr.project_cma, glr.recalibrate_cma, torch.tensor(s)) for s in of_cma]
        pooled = sum(weight * f for weight, f in zip(p, f_clip, strict=True))
        alpha = torch.sigmoid(layer(glr.gate[2], layer(glr.gate[0], pooled).clamp(min=0)))
        out = []
        for c in range(len(z)):
            f = f_clip[c] + alpha * f_cma[c]
            f = (f - f.mean()) / torch.sqrt(f.var(unbiased=False) + 1e-5) * glr.norm.weight + glr.norm.bias
            out.append(z[c] + glr.res_scale * layer(glr.head, f).squeeze())
        rows.append(torch.stack(out))
        alphas.append(alpha)
    return torch.stack(rows), torch.stack(alphas)


def make_glr(**arguments):
    """A refiner that has left its zero start."""
    torch.manual_seed(0)
    glr = SharedRefiner(dim=16, res_scale=0.7, **arguments)
    torch.nn.init.normal_(glr.head.weight)
    torch.nn.init.normal_(glr.head.bias)
    return glr


def inputs(classes=7, images=4):
    torch.manual_seed(3)
    text = torch.nn.functional.normalize(torch.randn(classes, 8), dim=1)
    return 20 * torch.rand(images, classes), 20 * torch.rand(images, classes), text


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_refiner_against_naive(classes):
    z, y, text = inputs(classes)
    near = neighbor_weights(text)
    torch.testing.assert_close(near, naive_neighbors(text))
    glr = make_glr()
    got, want = glr(z, y, near), naive_glr(glr, z, y, near)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got[1], want[1])
    assert got[1].shape == (4, 1)


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_fusion_gate_against_naive(classes):
    torch.manual_seed(0)
    gate, (_, y, _) = SharedFusion(hidden=8), inputs(classes)
    for row, statistics, w in zip(y.tolist(), fusion_statistics(y), gate(y), strict=True):
        p, ordered = sorted(softmax(row), reverse=True), sorted(row, reverse=True)
        leads = [ordered[0] - ordered[min(1, classes - 1)], ordered[0] - sum(row) / classes]
        want = [*p[:5], *[0.0] * (5 - classes), *map(math.asinh, leads), entropy(p)]
        torch.testing.assert_close(statistics, torch.tensor(want))
        hidden = layer(gate.layers[0], torch.tensor(want)).clamp(min=0)
        torch.testing.assert_close(w, torch.sigmoid(layer(gate.layers[2], hidden)))


def test_permuting_the_classes_permutes_the_logits_and_leaves_the_gates():
    z, y, text = inputs()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    glr, gate = make_glr(), SharedFusion()
    logits, alpha = glr(z, y, neighbor_weights(text))
    moved, same = glr(z[:, order], y[:, order], neighbor_weights(text[order]))
    torch.testing.assert_close(moved, logits[:, order])
    torch.testing.assert_close(same, alpha)
    torch.testing.assert_close(gate(y[:, order]), gate(y))
    assert not torch.allclose(logits, logits[:, order])


def test_starts_at_the_zero_shot_logits_exactly():
    z, y, text = inputs()
    assert torch.equal(SharedRefiner(res_scale=0.5)(z, y, neighbor_weights(text))[0], z)


def test_gate_sees_the_clip_side_only():
    z, y, text = inputs()
    glr, near = make_glr(), neighbor_weights(text)
    assert torch.equal(glr(z, y, near)[1], glr(z, y.flip(1), near)[1])
    assert not torch.allclose(glr(z, y, near)[1], glr(z.flip(1) / 2, y, near)[1])


def test_fixed_alpha_replaces_the_gate():
    z, y, text = inputs()
    glr = make_glr(fixed_alpha=0.25)
    assert torch.equal(glr(z, y, neighbor_weights(text))[1], torch.full((4, 1), 0.25))
    assert not any("gate" in name for name, _ in glr.named_parameters())


def test_tied_classes_and_certain_ones_have_finite_statistics_and_gradients():
    logits = torch.tensor([[5.0, 5.0, 1.0], [400.0, 0.0, -400.0]], requires_grad=True)
    near = neighbor_weights(torch.eye(3))
    statistics = branch_statistics(logits, near)
    assert statistics[0, 0, 1] == statistics[0, 1, 1] == 0
    (statistics.sum() + fusion_statistics(logits).sum()).backward()
    assert torch.isfinite(statistics).all() and torch.isfinite(logits.grad).all()


class TestRuns:
    @pytest.fixture
    def run(self, make, tmp_path):
        trainer = make(*MODE, *NO_TEST)
        trainer.train()
        return trainer, str(tmp_path / "run")

    def test_other_classes_and_another_number_of_them(self, run, make, dataset):
        trained, folder = run
        same = make(*MODE, out="same")
        same.load_model(folder)
        want, got = heads_on_test(trained), heads_on_test(same)
        assert all(torch.equal(got[head], want[head]) for head in HEADS)
        dataset(names=["airport", "bridge", "desert"])
        other = make(*MODE, out="other")
        other.load_model(folder)
        other.set_model_mode("eval")
        with torch.no_grad():
            images = torch.stack([item["img"] for item in other.test_loader.dataset])
            report = other.model_report(images)
        heads, learner = report["heads"], other.network.learner
        near = neighbor_weights(other.network.zeroshot)
        glr, alpha = learner.glr(heads["clip"], heads["cma"], near)
        assert near.shape == (3, 3) and learner.classnames == NAMES
        torch.testing.assert_close(heads["glr"], glr)
        assert not torch.equal(heads["glr"], heads["clip"])
        torch.testing.assert_close(report["values"]["alpha"], alpha)
        weight = learner.fusion(heads["cma"])
        torch.testing.assert_close(report["values"]["weight"], weight)
        torch.testing.assert_close(heads["final"], weight * heads["cma"] + (1 - weight) * heads["glr"])
        other.test()

    def test_columns_of_the_classes_trained_on(self, run, make, dataset):
        trained, folder = run
        dataset(names=[NAMES[3], NAMES[1]], class_indices=[3, 1])
        part = make(*MODE, out="part")
        part.load_model(folder)
        images = torch.stack([item["img"] for item in trained.test_loader.dataset])
        for trainer in (trained, part):
            trainer.set_model_mode("eval")
        with torch.no_grad():
            want, got = trained.model_heads(images), part.model_heads(images)
            part.bind_classes([NAMES[3], NAMES[1]])  # and as a class list of its own
            alone = part.model_heads(images)
        for head in HEADS:
            torch.testing.assert_close(got[head], want[head][:, [3, 1]])
        assert not torch.equal(alone["glr"], alone["clip"])
        assert not torch.allclose(alone["glr"], got["glr"])

    def test_the_form_is_part_of_a_checkpoint(self, run, make):
        with pytest.raises(ValueError, match="GLR_MODE 'dense' but got 'shared'"):
            make(out="dense").load_model(run[1])
        dense = make(*NO_TEST, out="dense")
        dense.train()
        with pytest.raises(ValueError, match="GLR_MODE 'shared' but got 'dense'"):
            make(*MODE, out="shared").load_model(dense.output_dir)

    @pytest.mark.parametrize("off", ["CMA", "GLR"])
    def test_with_a_part_off(self, make, off, tmp_path):
        saved = make(*MODE, f"TRAINER.DLRCLIP.{off}", False, *NO_TEST)
        saved.train()
        loaded = make(*MODE, f"TRAINER.DLRCLIP.{off}", False)
        loaded.load_model(str(tmp_path / "run"))
        want, got = heads_on_test(saved), heads_on_test(loaded)
        assert all(torch.equal(got[head], want[head]) for head in HEADS)

import math

import pytest
import torch

from trainers.dlrclip.glr import BETA_GRID, ChannelRecalibration, FusionGate, GateLogitRefiner, best_beta, fuse


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def recalibrate(module, z):
    return z * sigmoid((z @ module.squeeze.weight.T).clamp(min=0) @ module.excite.weight.T)


def naive_glr(glr, clip_logits, cma_logits):
    """The refiner's formulas over its parameters."""
    f_clip = recalibrate(glr.recalibrate_clip, gelu(clip_logits @ glr.project_clip.weight.T + glr.project_clip.bias))
    f_cma = recalibrate(glr.recalibrate_cma, gelu(cma_logits @ glr.project_cma.weight.T + glr.project_cma.bias))
    q1, _, q2, _ = glr.gate
    alpha = sigmoid((f_clip @ q1.weight.T + q1.bias).clamp(min=0) @ q2.weight.T + q2.bias)
    f = f_clip + alpha * f_cma
    f = (f - f.mean(1, keepdim=True)) / torch.sqrt(f.var(1, unbiased=False, keepdim=True) + 1e-5)
    f = f * glr.norm.weight + glr.norm.bias
    return clip_logits + glr.res_scale * (f @ glr.head.weight.T + glr.head.bias), alpha


@pytest.fixture
def logits():
    torch.manual_seed(3)
    return 20 * torch.rand(4, 5), 20 * torch.rand(4, 5)


def test_formula(logits):
    torch.manual_seed(0)
    glr = GateLogitRefiner(5, dim=16, res_scale=0.7)
    torch.nn.init.normal_(glr.head.weight)
    torch.nn.init.normal_(glr.head.bias)
    got, want = glr(*logits), naive_glr(glr, *logits)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], want[1])
    assert got[1].shape == (4, 1)


def test_starts_at_the_zero_shot_logits_exactly(logits):
    out, _ = GateLogitRefiner(5, dim=512, res_scale=0.5)(*logits)
    assert torch.equal(out, logits[0])


def test_gate_sees_the_zero_shot_logits_only(logits):
    glr = GateLogitRefiner(5, dim=16)
    assert torch.equal(glr(*logits)[1], glr(logits[0], logits[1] + 1)[1])
    assert not torch.equal(glr(*logits)[1], glr(logits[0] + 1, logits[1])[1])


def test_fixed_alpha_replaces_the_gate(logits):
    glr = GateLogitRefiner(5, dim=16, fixed_alpha=0.25)
    assert torch.equal(glr(*logits)[1], torch.full((4, 1), 0.25))
    assert not any("gate" in name for name, _ in glr.named_parameters())
    assert torch.equal(GateLogitRefiner(5, dim=16, fixed_alpha=0.0)(*logits)[1], torch.zeros(4, 1))


def test_sizes_and_biases():
    glr = GateLogitRefiner(5, dim=512)
    assert [tuple(glr.gate[i].weight.shape) for i in (0, 2)] == [(128, 512), (1, 128)]
    assert glr.res_scale.item() == pytest.approx(0.01)
    cr = ChannelRecalibration(512)
    assert cr.squeeze.weight.shape == (64, 512)
    assert cr.squeeze.bias is None
    assert cr.excite.bias is None


def test_half_precision_logits_are_refined_in_fp32(logits):
    glr = GateLogitRefiner(5, dim=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, alpha = glr(*logits)
        weight = FusionGate(5)(logits[1])
    assert out.dtype == alpha.dtype == weight.dtype == torch.float32
    assert torch.equal(out, glr(*logits)[0])


def test_fusion_gate(logits):
    torch.manual_seed(0)
    gate = FusionGate(5, hidden=128)
    first, _, second, _ = gate.layers
    assert first.weight.shape == (128, 5)
    h = (logits[1] @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(gate(logits[1]), sigmoid(h @ second.weight.T + second.bias))


def test_fuse(logits):
    cma, glr = logits
    assert torch.equal(fuse(cma, glr, 1.0), cma)
    assert torch.equal(fuse(cma, glr, 0.0), glr)
    weight = torch.tensor([[0.1], [0.2], [0.3], [0.4]])
    want = torch.stack([w * c + (1 - w) * g for w, c, g in zip(weight, cma, glr, strict=True)])
    torch.testing.assert_close(fuse(cma, glr, weight), want)


class TestBestBeta:
    def test_grid(self):
        assert len(BETA_GRID) == 51
        assert BETA_GRID[0] == 0
        assert BETA_GRID[-1] == 1
        assert BETA_GRID[1] == pytest.approx(0.02)

    def test_takes_the_most_correct(self):
        # Image 0 is right for beta > 0.5122, image 1 for beta < 0.7538.
        cma, glr = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.05], [3.0625, 0.0]])
        beta = best_beta(cma, glr, torch.tensor([0, 0]), prefer=0.0)
        assert beta.value == pytest.approx(0.52)
        assert beta.accuracy == 100.0
        assert best_beta(cma, glr, torch.tensor([0, 0]), prefer=0.9).value == pytest.approx(0.74)

    def test_tie_goes_to_the_mean_learnt_weight(self):
        same = torch.eye(3)
        for prefer in (0.0, 0.33, 0.5, 1.0):
            value = best_beta(same, same, torch.arange(3), prefer=prefer).value
            assert abs(value - prefer) == pytest.approx(min(abs(b - prefer) for b in BETA_GRID))

    def test_ties_as_in_the_source(self):
        """A loop over the betas from 0 that keeps the first of the best."""
        torch.manual_seed(1)
        cma, glr, labels = torch.randn(8, 3), torch.randn(8, 3), torch.randint(3, (8,))
        first, most = 0.0, -1
        for b in BETA_GRID:
            correct = int(((b * cma + (1 - b) * glr).argmax(1) == labels).sum())
            if correct > most:
                first, most = b, correct
        assert best_beta(cma, glr, labels, prefer=0.0).value == first

    def test_brute_force(self):
        torch.manual_seed(0)
        cma, glr, labels = torch.randn(30, 4), torch.randn(30, 4), torch.randint(4, (30,))
        rows = list(zip(cma, glr, labels, strict=True))
        correct = [sum((b * c + (1 - b) * g).argmax() == y for c, g, y in rows) for b in BETA_GRID]
        beta = best_beta(cma, glr, labels, prefer=0.4)
        assert correct[BETA_GRID.index(beta.value)] == max(correct)
        assert beta.accuracy == pytest.approx(100 * int(max(correct)) / 30)

    def test_no_images(self):
        with pytest.raises(ValueError, match="at least one image"):
            best_beta(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0), prefer=0.5)

import pytest
import torch

from trainers.modules.cross_modal_adapter import CrossModalAdapter, share_in_order


def naive(adapter, side, block, shared, x):
    """The adapter's formula, one token at a time."""
    own, middle = getattr(adapter, side)[str(block)], adapter.shared[str(shared)]
    flat = x.reshape(-1, x.shape[-1])
    rows = []
    for token in flat:
        h = (own.down.weight @ token + own.down.bias).clamp(min=0)
        h = (middle.weight @ h + middle.bias).clamp(min=0)
        rows.append(own.scale * (own.up.weight @ h + own.up.bias))
    return torch.stack(rows).reshape(x.shape)


def test_formula_on_both_sides():
    torch.manual_seed(0)
    adapter = CrossModalAdapter({2: 10, 3: 10}, {2: 6, 3: 6}, dim=4, scale=0.5)
    image, text = torch.randn(2, 5, 10), torch.randn(3, 7, 6)
    torch.testing.assert_close(adapter.visual_edit.parallel(3, image), naive(adapter, "visual", 3, 3, image))
    torch.testing.assert_close(adapter.text_edit.parallel(2, text), naive(adapter, "text", 2, 2, text))
    assert adapter.visual_edit.parallel(1, image) is None
    assert adapter.text_edit.parallel(4, text) is None


@pytest.mark.parametrize("scale", [0.001, 0.1, 3.0, -0.5])
@pytest.mark.parametrize("learn_scale", [True, False])
def test_gradient_scaling(scale, learn_scale):
    """What lies before gets the true gradient, what the adapter learns 1 / scale times its own; the output is equal."""

    def run(grad_scaling):
        torch.manual_seed(0)
        adapter = CrossModalAdapter(
            {2: 10, 3: 10}, {2: 6, 3: 6}, dim=4, scale=scale, learn_scale=learn_scale, grad_scaling=grad_scaling
        )
        for parameter in adapter.parameters():  # a scale that has been learnt on: the factor stays the initial one
            if learn_scale and parameter.ndim == 0:
                parameter.data *= 1.5
        image, text = torch.randn(2, 5, 10).requires_grad_(), torch.randn(3, 7, 6).requires_grad_()
        out = torch.cat(
            [
                adapter.visual_edit.parallel(3, adapter.visual_edit.parallel(2, image)).flatten(),
                adapter.text_edit.parallel(3, adapter.text_edit.parallel(2, text)).flatten(),
            ]
        )
        learnt = [p for p in adapter.parameters() if p.requires_grad]
        grads = torch.autograd.grad((out * torch.linspace(-1, 2, len(out))).sum(), [image, text, *learnt])
        return out, grads[:2], grads[2:]

    (plain, before, own), (out, scaled_before, scaled_own) = run(False), run(True)
    assert torch.equal(plain, out)
    for want, got in zip(before, scaled_before, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    for want, got in zip(own, scaled_own, strict=True):
        torch.testing.assert_close(got, want / scale, rtol=1e-4, atol=1e-5 * float((want / scale).abs().max()))


def test_middle_layer_is_one_for_both_encoders():
    adapter = CrossModalAdapter({2: 10}, {2: 6}, dim=4, scale=1.0)
    assert set(adapter.shared) == {"2"}
    loss = adapter.visual_edit.parallel(2, torch.randn(2, 5, 10)).sum()
    only_image = torch.autograd.grad(loss, adapter.shared["2"].weight)[0]
    both = (
        loss.detach()
        + adapter.visual_edit.parallel(2, torch.ones(1, 10)).sum()
        + adapter.text_edit.parallel(2, torch.ones(6)).sum()
    )
    grad = torch.autograd.grad(both, adapter.shared["2"].weight)[0]
    assert only_image.shape == grad.shape == (4, 4)
    assert sum(p is adapter.shared["2"].weight for p in adapter.parameters()) == 1


def test_feature_map_is_a_bottleneck_over_channels():
    torch.manual_seed(0)
    adapter = CrossModalAdapter({9: 8}, {5: 6}, dim=3, scale=0.3, share={9: 5})
    x = torch.randn(2, 8, 4, 5)
    want = naive(adapter, "visual", 9, 5, x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    torch.testing.assert_close(adapter.visual_edit.parallel(9, x), want)
    assert adapter.visual_edit.parallel(1, x) is None


@pytest.mark.parametrize(
    ("visual", "text", "want"),
    [
        ([8, 9, 10], [10, 11, 12], {8: 10, 9: 11, 10: 12}),
        ([1, 2, 3, 4], [11, 12], {1: 11, 2: 11, 3: 11, 4: 12}),
        ([7, 8], [5, 6, 7, 8], {7: 7, 8: 8}),
        (list(range(8, 17)), list(range(5, 13)), {8: 5, **{i: i - 4 for i in range(9, 17)}}),
    ],
)
def test_share_in_order(visual, text, want):
    assert share_in_order(visual, text) == want


def test_initialization():
    torch.manual_seed(0)
    adapter = CrossModalAdapter({1: 400}, {1: 300}, dim=32, scale=0.01)
    half = adapter.visual["1"]
    assert all(torch.count_nonzero(layer.bias) == 0 for layer in (half.down, half.up, adapter.shared["1"]))
    assert half.scale.item() == pytest.approx(0.01)
    assert half.scale.requires_grad
    # Kaiming normal with fan_out: deviation sqrt(2 / number of outputs).
    assert half.down.weight.std().item() == pytest.approx((2 / 32) ** 0.5, rel=0.05)
    assert half.up.weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.05)
    assert adapter.scales().keys() == {"visual/1", "text/1"}


def test_half_precision_tokens_are_adapted_in_fp32():
    adapter = CrossModalAdapter({1: 8}, {1: 8}, dim=2)
    x = torch.randn(2, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapter.visual_edit.parallel(1, x.bfloat16())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, adapter.visual_edit.parallel(1, x.bfloat16().float()))


def test_errors():
    with pytest.raises(ValueError, match="at least 1 but got 0"):
        CrossModalAdapter({1: 8}, {1: 8}, dim=0)
    with pytest.raises(ValueError, match="at least one block"):
        CrossModalAdapter({}, {1: 8})
    with pytest.raises(ValueError, match="scale other than 0 but got 0"):
        CrossModalAdapter({1: 8}, {1: 8}, scale=0.0, grad_scaling=True)

"""The towers against open_clip's plain forward and against naive block-by-block loops."""

from __future__ import annotations

import copy
import dataclasses

import open_clip
import pytest
import torch
from torch import Tensor

from trainers.clip import CLIP, BlockEdit, TextTower, VisionTower
from trainers.clip.blocks import feed_forward
from trainers.clip.text import SHARING_COST
from trainers.clip.vision import build_vision_tower


class InSinglePrecision(BlockEdit):
    """Maps in fp32 beside a half-precision backbone."""

    def __init__(self, maps) -> None:
        self.maps = maps

    def parallel(self, number: int, x: Tensor) -> Tensor | None:
        return self.maps(number, x.float())


class OneToken(BlockEdit):
    """Wrong: it returns one token of those that it sees."""

    def parallel(self, number: int, x: Tensor) -> Tensor:
        return x[:, :1]


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_plain_features_equal_open_clip(build_model, images, prompts, kind, quick_gelu):
    model = build_model(kind, quick_gelu=quick_gelu)
    clip = CLIP(model)
    with torch.no_grad():
        assert_close(clip.encode_image(images), model.encode_image(images))
        assert_close(clip.encode_text(prompts), model.encode_text(open_clip.tokenize(prompts)))
    assert clip.logit_scale == pytest.approx(model.logit_scale.exp().item())
    assert (clip.embed_dim, clip.image_size, clip.dtype) == (32, 64, torch.float32)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_features_before_the_projection(build_model, images, kind):
    """They are what open_clip gives without the projection; projected, they are CLIP's features."""
    model = build_model(kind)
    clip, plain = CLIP(copy.deepcopy(model)), model.visual
    if kind == "vit":
        plain.proj = None
    else:
        layer = plain.attnpool.c_proj
        layer.weight = torch.nn.Parameter(torch.eye(layer.in_features))
        layer.bias = torch.nn.Parameter(torch.zeros(layer.in_features))
    weight, bias = clip.visual.projection()
    with torch.no_grad():
        pooled = clip.pool_image(images)
        assert_close(pooled, plain(images))
        projected = pooled @ weight
        assert_close(projected if bias is None else projected + bias, clip.encode_image(images))
    assert (bias is None) == (kind == "vit")
    assert pooled.shape == (len(images), clip.visual.pooled_dim) and weight.shape == (clip.visual.pooled_dim, 32)


@pytest.mark.parametrize(
    "prompts",
    [
        ["a photo of a cat."],  # one prompt: everything is common to all
        ["a photo of a cat.", "a photo of a cat."],  # all the same
        ["a photo", "a photo of a cat."],  # one is a prefix of the other, up to its end-of-text token
        ["cat", "a photo of a dog"],  # nothing shared but the start
        ["", "x"],
        ["a photo of a cat."] * 2 + ["many " * 100],  # longer than the context
    ],
)
def test_shared_prefix_and_truncation_change_nothing(oracle, build_model, prompts):
    model = build_model("vit")
    text: TextTower = CLIP(model).text
    adapters = oracle.Adapters(text.widths, (2, 3, 4))
    with torch.no_grad():
        assert_close(text(prompts), oracle.naive_text(model, prompts))
        state = text.prefix(text.tokenise(prompts), 1)
        assert_close(text.suffix(state, 2, [adapters]), oracle.naive_text(model, prompts, adapters))


def test_tokenise_truncates_and_counts_what_is_shared(build_model, prompts):
    tokens = CLIP(build_model("vit")).text.tokenise(prompts)
    full = open_clip.tokenize(prompts)
    assert tokens.ids.shape[1] == int(full.argmax(dim=-1).max()) + 1
    assert torch.equal(tokens.ids, full[:, : tokens.ids.shape[1]])
    assert torch.equal(tokens.eot, full.argmax(dim=-1))
    assert tokens.shared == 4  # <start> a photo of; then "a" or "an"


def test_sharing_nothing_changes_nothing(build_model, prompts):
    text = CLIP(build_model("vit")).text
    tokens = text.tokenise(prompts)
    with torch.no_grad():
        apart = text.suffix(text.prefix(dataclasses.replace(tokens, shared=0), 0), 1)
        assert_close(apart, text(prompts))


@pytest.mark.parametrize(("cost", "shared"), [(0, 4), (12, 4), (13, 0)])
def test_the_beginning_is_shared_where_it_saves_enough(build_model, monkeypatch, cost, shared):
    text = CLIP(build_model("vit")).text
    some = [f"a photo of {name}." for name in ("cat", "the dog", "snow", "two boats")]
    whole = text(some)
    monkeypatch.setitem(SHARING_COST, "cpu", cost)
    tokens = text.tokenise(some)  # three prompts more than one, of which 4 tokens could be shared
    assert tokens.shared == shared
    assert_close(text.suffix(text.prefix(tokens, 0), 1), whole)


def test_too_long_prompt_is_reported(build_model, caplog):
    CLIP(build_model("vit")).text.tokenise(["word " * 90])
    assert "1 prompts of more than 77 tokens are cut" in caplog.text
    caplog.clear()
    CLIP(build_model("vit")).text.tokenise([" ".join(["cat"] * 75)])  # with start and end just 77
    assert "are cut" not in caplog.text


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4])
def test_text_prefix_then_suffix_is_the_whole(build_model, prompts, stop):
    text = CLIP(build_model("vit")).text
    with torch.no_grad():
        assert_close(text.suffix(text.prefix(text.tokenise(prompts), stop), stop + 1), text(prompts))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_vision_prefix_then_suffix_is_the_whole(build_model, images, kind):
    visual: VisionTower = CLIP(build_model(kind)).visual
    with torch.no_grad():
        for stop in range(visual.depth + 1):
            assert_close(visual.suffix(visual.prefix(images, stop), stop + 1), visual(images))


def test_adapted_text_and_its_gradients_equal_the_naive_computation(oracle, build_model, prompts):
    model = build_model("vit")
    text = CLIP(model).text
    ours, naive = oracle.Adapters(text.widths, (2, 3, 4)), oracle.Adapters(text.widths, (2, 3, 4))
    with torch.no_grad():
        state = text.prefix(text.tokenise(prompts), 1)
    out, expected = text.suffix(state, 2, [ours]), oracle.naive_text(model, prompts, naive)
    assert_close(out, expected)
    out.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for a, b in zip(ours.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_adapted_images_and_gradients_equal_the_naive_computation(oracle, build_model, images, kind):
    model = build_model(kind)
    visual = CLIP(model).visual
    blocks = visual.adaptable[-2:]
    ours, naive = oracle.Adapters(visual.widths, blocks), oracle.Adapters(visual.widths, blocks)
    with torch.no_grad():
        hidden = visual.prefix(images, blocks[0] - 1)
    out, expected = visual.suffix(hidden, blocks[0], [ours]), oracle.naive_image(model, images, naive)
    assert_close(out, expected)
    out.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for a, b in zip(ours.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_adapters_after_the_blocks_equal_hooks_on_open_clip_s_own(oracle, build_model, images, kind):
    model = build_model(kind)
    clip = CLIP(build_model(kind))
    adapters = oracle.Adapters(clip.visual.widths, tuple(clip.visual.widths))
    got = clip.visual.suffix(clip.visual.prefix(images, 0), 1, [oracle.After(adapters)])
    visual = model.visual
    stages = (visual.layer1, visual.layer2, visual.layer3, visual.layer4) if kind == "resnet" else ()
    blocks = [block for stage in stages for block in stage] or visual.transformer.resblocks
    for i, block in enumerate(blocks, start=1):
        block.register_forward_hook(lambda _, seen, out, i=i: out + adapters(i, out))
    assert_close(got, visual(images))
    assert not torch.allclose(got, clip.visual(images))


def test_beside_the_mlp_and_after_are_the_same_for_a_resnet(oracle, build_model, images):
    clip = CLIP(build_model("resnet"))
    adapters = oracle.Adapters(clip.visual.widths, tuple(clip.visual.widths))
    hidden = clip.visual.prefix(images, 0)
    beside = clip.visual.suffix(hidden, 1, [oracle.BesideMLP(adapters)])
    assert torch.equal(beside, clip.visual.suffix(hidden, 1, [oracle.After(adapters)]))


def test_adapter_sees_shared_tokens_once_and_one_token_in_the_last_block(oracle, build_model, images, prompts):
    clip = CLIP(build_model("vit"))
    adapters = oracle.Adapters(clip.text.widths, (3, 4))
    tokens = clip.text.tokenise(prompts)
    length, p = tokens.ids.shape[1], tokens.shared
    clip.text.suffix(clip.text.prefix(tokens, 2), 3, [adapters])
    assert adapters.seen == [(3, (1, p, 64)), (3, (3, length - p, 64)), (4, (3, 1, 64))]
    adapters.seen.clear()
    clip.visual.suffix(clip.visual.prefix(images, 2), 3, [adapters])
    assert adapters.seen == [(3, (3, 17, 64)), (4, (3, 1, 64))]


def test_block_numbers_and_widths(build_model):
    vit, resnet = CLIP(build_model("vit")), CLIP(build_model("resnet")).visual
    assert (vit.visual.kind, vit.visual.depth, vit.visual.adaptable) == ("vit", 4, (1, 2, 3, 4))
    assert vit.visual.widths == vit.text.widths == dict.fromkeys(range(1, 5), 64)
    assert (resnet.kind, resnet.depth, resnet.adaptable) == ("resnet", 6, (4, 5, 6))
    assert resnet.widths == {1: 64, 2: 128, 3: 128, 4: 256, 5: 256, 6: 512}


def test_frozen_and_always_in_eval_mode(build_model):
    clip = CLIP(build_model("resnet")).train()
    assert not any(module.training for module in clip.modules())
    assert not any(p.requires_grad for p in clip.parameters())


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "amp"])
def test_precisions(oracle, build_model, images, prompts, kind, precision):
    reference, clip = CLIP(build_model(kind)), CLIP(build_model(kind), precision=precision)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16, "amp": torch.float32}[precision]
    assert clip.dtype == clip.visual.dtype == half
    assert all(p.dtype == torch.float32 for name, p in clip.named_parameters() if ".ln_" in name or ".bn" in name)
    assert clip.weights_digest == reference.weights_digest
    adapter = oracle.Adapters(clip.text.widths, (4,))  # fp32 beside a half-precision backbone
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "amp"):
        image = clip.encode_image(images).float()
        state = clip.text.prefix(clip.text.tokenise(prompts), 3)
        text = clip.text.suffix(state, 4, [InSinglePrecision(adapter)])
    assert torch.cosine_similarity(image, reference.encode_image(images)).min() > 0.99
    expected = reference.text.suffix(reference.text.prefix(reference.text.tokenise(prompts), 3), 4, [adapter])
    assert torch.cosine_similarity(text.float(), expected).min() > 0.99
    text.float().sum().backward()
    assert adapter.maps["4"].weight.grad.isfinite().all()


def test_digest_tells_weights_apart(build_model):
    model = build_model("vit")
    first = CLIP(model).weights_digest
    with torch.no_grad():
        model.text_projection[0, 0] += 1
    assert CLIP(model).weights_digest != first


def test_what_our_towers_cannot_run_is_refused(build_model):
    for vision in ({"pool_type": "avg"}, {"final_ln_after_pool": True}, {"qk_norm": True}):
        with pytest.raises(ValueError, match="class token"):
            CLIP(open_clip.CLIP(32, {"layers": 1, "width": 64, "image_size": 64, **vision}, {"layers": 1, "width": 64}))
    with pytest.raises(ValueError, match="precision to be one of"):
        CLIP(build_model("vit"), precision="fp8")


def test_wrong_arguments(build_model, images, prompts):
    clip = CLIP(build_model("vit"))
    with pytest.raises(ValueError, match=r"shape \[B, \(3, 64, 64\)\] but got \(3, 3, 32, 32\)"):
        clip.encode_image(images[:, :, :32, :32])
    with pytest.raises(ValueError, match=r"stop to be in 0\.\.4 but got 5"):
        clip.visual.prefix(images, 5)
    with pytest.raises(ValueError, match=r"start to be in 1\.\.5 but got 0"):
        clip.visual.suffix(clip.visual.prefix(images, 0), 0)
    tokens = clip.text.tokenise(prompts)
    with pytest.raises(ValueError, match=r"stop to be in 0\.\.4 but got -1"):
        clip.text.prefix(tokens, -1)
    with pytest.raises(ValueError, match="start to be 3, the block the state enters, but got 2"):
        clip.text.suffix(clip.text.prefix(tokens, 2), 2)
    with pytest.raises(ValueError, match="return shape"):
        clip.visual.suffix(clip.visual.prefix(images, 0), 1, [OneToken()])
    for nothing in ([], "a cat"):
        with pytest.raises(ValueError, match="non-empty list"):
            clip.text.tokenise(nothing)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_branches_may_part_at_a_block(oracle, build_model, images, prompts, kind, checkpointing):
    """`enter` and the rest give what `suffix` gives, with an adapter and without, at the first, a middle, the last."""
    clip = CLIP(build_model(kind))
    for number in (1, 2, clip.visual.depth):
        adapter = oracle.Adapters(clip.visual.widths, tuple(range(number, clip.visual.depth + 1)))
        hidden = clip.visual.prefix(images, number - 1)
        seen, out = clip.visual.enter(hidden, number)
        torch.testing.assert_close(clip.visual.suffix(out, number + 1), clip.visual(images))
        joined = clip.visual.join(out, [adapter], number, seen)
        got = clip.visual.suffix(joined, number + 1, [adapter], checkpointing=checkpointing)
        torch.testing.assert_close(got, clip.visual.suffix(hidden, number, [adapter]))
    for number in (1, 2, clip.text.depth):
        adapter = oracle.Adapters(clip.text.widths, tuple(range(number, clip.text.depth + 1)))
        state = clip.text.prefix(clip.text.tokenise(prompts), number - 1)
        seen, out = clip.text.enter(state)
        torch.testing.assert_close(clip.text.suffix(out, number + 1), clip.text(prompts))
        joined = clip.text.join(out, [adapter], seen)
        got = clip.text.suffix(joined, number + 1, [adapter], checkpointing=checkpointing)
        torch.testing.assert_close(got, clip.text.suffix(state, number, [adapter]))
    with pytest.raises(ValueError, match="behind the last"):
        clip.text.enter(out)
    with pytest.raises(ValueError, match="start to be in"):
        clip.visual.enter(hidden, clip.visual.depth + 1)


def test_prompts_taken_alone_are_cut_at_their_longest(build_model, prompts):
    text = CLIP(build_model("vit")).text
    tokens = text.tokenise(prompts)
    rows = torch.tensor([2, 0])
    part = tokens.take(rows)
    assert part.ids.shape[1] == int(tokens.eot[rows].max()) + 1 < tokens.ids.shape[1]
    torch.testing.assert_close(text.suffix(text.prefix(part, 0), 1), text(prompts)[rows])


@pytest.mark.parametrize("quick", [True, False])
def test_feed_forward_is_the_block_s_own(build_model, quick):
    mlp = build_model("vit", quick_gelu=quick).visual.transformer.resblocks[0].mlp.requires_grad_(False)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(feed_forward(mlp, x), mlp(x))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weight = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(4))
    got, want = feed_forward(mlp, ours), mlp(theirs)
    torch.testing.assert_close(got, want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_same_weights_with_another_activation_are_told_apart():
    vision = {"layers": 1, "width": 16, "head_width": 16, "patch_size": 16, "image_size": 32}
    text = {"context_length": 77, "vocab_size": 64, "width": 16, "heads": 1, "layers": 1}
    models = [open_clip.CLIP(8, vision, text, quick_gelu=quick).eval() for quick in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    towers = [build_vision_tower(model.visual) for model in models]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.equal(towers[0](images), towers[1](images))
    assert [tower.form for tower in towers] == ["", "GELU"]  # part of the key of cached features

"""Edits of both towers against a naive computation: whole sequences at full length, every token of every block."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
from torch import Tensor, nn

from trainers.clip import CLIP, BlockEdit, kinds
from trainers.clip.edits import KINDS

WIDTH, DEPTH = 64, 4  # of both towers of the small CLIP
PROMPTS = 3


def drawn(*shape: int, std: float = 0.3, seed: int = 5) -> nn.Parameter:
    return nn.Parameter(std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


class Tokens(BlockEdit, nn.Module):
    """Insert tokens before a block and replace them by others before later blocks.

    Args:
        side: "visual": behind the others; "text": from a position on.
        blocks: the first has tokens inserted, the others have them replaced.
        count: of tokens.
        at: position of the first one in a prompt.
        own: whether each prompt has tokens of its own.
        shared: whether to say that no token behind them is touched.
    """

    def __init__(self, side, blocks, count=2, at=1, own=False, shared=False, seed=5):
        super().__init__()
        self.side, self.count, self.at = side, count, at
        self.first_block = min(blocks)
        self.leading = at + count if shared else None
        shape = (PROMPTS, count, WIDTH) if own else (count, WIDTH)
        self.learnt = nn.ParameterDict({str(i): drawn(*shape, seed=seed + i) for i in blocks})
        self.seen: list[tuple[int, tuple[int, ...]]] = []

    def tokens(self, number, x):
        self.seen.append((number, tuple(x.shape)))
        if str(number) not in self.learnt:
            return x
        new = self.learnt[str(number)].expand(len(x), -1, -1)
        gone = 0 if number == self.first_block else self.count
        if self.side == "visual":
            return torch.cat([x[:, : x.shape[1] - gone], new], dim=1)
        return torch.cat([x[:, : self.at], new, x[:, self.at + gone :]], dim=1)


class Removed(BlockEdit):
    """Take tokens that were inserted behind the start, or at the end, out again before a block."""

    def __init__(self, side, block, count=2):
        self.side, self.first_block, self.count = side, block, count

    def tokens(self, number, x):
        if number != self.first_block:
            return x
        if self.side == "visual":
            return x[:, : -self.count]
        return torch.cat([x[:, :1], x[:, 1 + self.count :]], dim=1)


class Maps(BlockEdit, nn.Module):
    """A linear map per block; the classes below say where what it makes is added."""

    def __init__(self, blocks=range(1, DEPTH + 1), seed=20):
        super().__init__()
        self.maps = nn.ParameterDict({str(i): drawn(WIDTH, WIDTH, std=0.04, seed=seed + i) for i in blocks})

    def made(self, number, x):
        return x.float() @ self.maps[str(number)] if str(number) in self.maps else None


class Parallel(Maps):
    def parallel(self, number, x):
        return self.made(number, x)


class BesideMLP(Maps):
    def beside_mlp(self, number, x):
        return self.made(number, x)


class After(Maps):
    def after(self, number, h):
        return self.made(number, h)


class Project(BlockEdit, nn.Module):
    def __init__(self, blocks=range(1, DEPTH + 1), which="qkv"):
        super().__init__()
        self.maps = nn.ParameterDict(
            {f"{i}{w}": drawn(WIDTH, WIDTH, std=0.1, seed=40 + 3 * i + ord(w)) for i in blocks for w in which}
        )

    def project(self, number, which, x):
        return x.float() @ self.maps[f"{number}{which}"] if f"{number}{which}" in self.maps else None


class Norms(BlockEdit, nn.Module):
    def __init__(self, names, seed=60):
        super().__init__()
        self.learnt = nn.ParameterDict({name: drawn(2, WIDTH, seed=seed + k) for k, name in enumerate(names)})

    def norm(self, number, which, norm):
        assert norm.normalized_shape == (WIDTH,)
        pair = self.learnt.get(f"{number}{which}", None)
        return None if pair is None else (1 + pair[0], pair[1])


INSIDE = [f"{i}ln_{k}" for i in range(1, DEPTH + 1) for k in (1, 2)]
OUTSIDE = {"visual": ["0ln_pre", f"{DEPTH + 1}ln_post"], "text": [f"{DEPTH + 1}ln_final"]}

# What is tried: name -> the list of edits for a side.
CASES = {
    "tokens before the first block": lambda side: [Tokens(side, [1])],
    "tokens before a middle block": lambda side: [Tokens(side, [3])],
    "tokens before the last block": lambda side: [Tokens(side, [DEPTH], count=3)],
    "tokens before every block": lambda side: [Tokens(side, [1, 2, 3, 4])],
    "tokens of each prompt's own": lambda side: [Tokens(side, [2, 3], own=True)],
    "tokens in the middle": lambda side: [Tokens(side, [2, 4], at=3)],
    "shared tokens": lambda side: [Tokens(side, [1, 2, 4], shared=True)],
    "more leading tokens than are shared": lambda side: [Tokens(side, [2, 3], at=5, shared=True)],
    "tokens taken out again": lambda side: [Tokens(side, [1, 2]), Removed(side, 3)],
    "two of tokens": lambda side: [Tokens(side, [1, 2], seed=5), Tokens(side, [2, 3], count=1, shared=True, seed=9)],
    "two of tokens, the first sharing": lambda side: [Tokens(side, [1, 2], shared=True), Tokens(side, [3], 1, seed=9)],
    "tokens, parallel, project": lambda side: [Tokens(side, [2, 3, 4]), Parallel([3, 4]), Project([1, 2, 4])],
    "shared tokens, parallel, project": lambda side: [Parallel(), Project(), Tokens(side, [1, 2, 3], shared=True)],
    "projections of keys": lambda side: [Project(which="k")],
    "beside, parallel, after": lambda side: [BesideMLP(seed=20), Parallel(seed=30), After(seed=70)],
    "two after, two parallel": lambda side: [After(seed=20), After(seed=30), Parallel(seed=80), Parallel(seed=90)],
    "norms in the blocks": lambda side: [Norms(INSIDE)],
    "norms around the blocks": lambda side: [Norms(OUTSIDE[side])],
    "norms twice": lambda side: [Norms([*INSIDE, *OUTSIDE[side]]), Norms(INSIDE[2:4], seed=90)],
    "everything": lambda side: [
        Norms([*INSIDE, *OUTSIDE[side]]), Tokens(side, [2, 3, 4]), Project(), Parallel(), BesideMLP(seed=50), After(),
    ],
}  # fmt: skip


# The oracle


def naive_norm(norm, x, edits, number, which):
    gain, bias = norm.weight, norm.bias
    for edit in edits:
        gain, bias = edit.norm(number, which, norm) or (gain, bias)
    mean, deviation = x.mean(dim=-1, keepdim=True), x.var(dim=-1, keepdim=True, unbiased=False)
    return (x - mean) / (deviation + norm.eps).sqrt() * gain + bias


def added(parts):
    return sum(part for part in parts if part is not None)


def naive_blocks(blocks, x, edits, causal):
    for i, block in enumerate(blocks, start=1):
        for edit in edits:
            x = edit.tokens(i, x)
        n, attn, length = naive_norm(block.ln_1, x, edits, i, "ln_1"), block.attn, x.shape[1]
        weights, biases = attn.in_proj_weight.split(WIDTH), attn.in_proj_bias.split(WIDTH)
        q, k, v = (
            n @ w.t() + b + added(edit.project(i, which, n) for edit in edits)
            for which, w, b in zip("qkv", weights, biases, strict=True)
        )
        mask = torch.full((length, length), -math.inf).triu(1) if causal else 0
        heads = []
        for part in range(attn.num_heads):
            own = slice(part * attn.head_dim, (part + 1) * attn.head_dim)
            scores = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(attn.head_dim) + mask
            heads.append(scores.softmax(dim=-1) @ v[..., own])
        x = x + torch.cat(heads, dim=-1) @ attn.out_proj.weight.t() + attn.out_proj.bias
        out = x + block.mlp(naive_norm(block.ln_2, x, edits, i, "ln_2"))
        out = out + added(edit.beside_mlp(i, x) for edit in edits) + added(edit.parallel(i, n) for edit in edits)
        for edit in edits:
            out = out + added([edit.after(i, out)])
        x = out
    return x


def naive(model, side, given, edits):
    if side == "visual":
        visual = model.visual
        patches = visual.conv1(given).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(given), 1, -1), patches], dim=1)
        x = naive_norm(visual.ln_pre, x + visual.positional_embedding, edits, 0, "ln_pre")
        x = naive_blocks(visual.transformer.resblocks, x, edits, causal=False)
        return naive_norm(visual.ln_post, x[:, 0], edits, DEPTH + 1, "ln_post") @ visual.proj
    ids = open_clip.tokenize(given)
    x = naive_blocks(
        model.transformer.resblocks, model.token_embedding(ids) + model.positional_embedding, edits, causal=True
    )
    end = ids.argmax(dim=-1) + x.shape[1] - ids.shape[1]
    return naive_norm(model.ln_final, x[range(len(ids)), end], edits, DEPTH + 1, "ln_final") @ model.text_projection


# The towers


def run(clip, side, given, edits, start=1, checkpointing=False):
    if side == "visual":
        return clip.visual.suffix(clip.visual.prefix(given, start - 1, edits), start, edits, checkpointing)
    return clip.text.suffix(clip.text.prefix(clip.text.tokenise(given), start - 1), start, edits, checkpointing)


def learnt(edits):
    return [p for edit in edits if isinstance(edit, nn.Module) for p in edit.parameters()]


def gradients(out, edits):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(8))
    return torch.autograd.grad((out * weight).sum(), learnt(edits), materialize_grads=True)


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 + 1e-5 * float(b.abs().max()))


@pytest.fixture
def given(images, prompts):
    return {"visual": images, "text": prompts}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("side", ["visual", "text"])
def test_features_and_gradients_are_the_naive_ones(build_model, given, side, case):
    model, edits = build_model("vit"), CASES[case](side)
    clip = CLIP(model)
    want = naive(model, side, given[side], edits)
    got = run(clip, side, given[side], edits)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(want, run(clip, side, given[side], ()), atol=1e-3)  # the edits do something
    wanted = gradients(want, edits)
    replaced = 2 if case == "norms twice" else 0  # by the second edit: without effect
    assert sum(not grad.any() for grad in wanted) == replaced
    assert_same(gradients(got, edits), wanted)
    again = run(clip, side, given[side], edits, checkpointing=True)
    assert torch.equal(again, got)
    assert_same(gradients(again, edits), wanted)


@pytest.mark.parametrize("side", ["visual", "text"])
@pytest.mark.parametrize("shared", [False, True])
def test_what_comes_before_the_first_edited_block_can_be_computed_once(build_model, given, side, shared):
    edits = [Tokens(side, [3, 4], shared=shared)]
    clip = CLIP(build_model("vit"))
    want = run(clip, side, given[side], edits)
    torch.testing.assert_close(run(clip, side, given[side], edits, start=edits[0].first_block), want)


def test_the_order_of_the_list_counts(build_model, prompts):
    clip = CLIP(build_model("vit"))
    for edits in ([After(seed=20), After(seed=30)], [Tokens("text", [2], 1, seed=1), Tokens("text", [2], 1, seed=2)]):
        first, second = run(clip, "text", prompts, edits), run(clip, "text", prompts, edits[::-1])
        assert not torch.allclose(first, second, atol=1e-4)


def test_prompts_share_their_beginning_up_to_the_first_block_whose_tokens_are_edited(oracle, build_model, prompts):
    clip = CLIP(build_model("vit"))
    tokens = clip.text.tokenise(prompts)
    (n, length), p = tokens.ids.shape, tokens.shared
    for shared in (False, True):
        adapters, edit = oracle.Adapters(clip.text.widths, ()), Tokens("text", [2, 3], count=2, shared=shared)
        clip.text.suffix(clip.text.prefix(tokens, 0), 1, [adapters, edit])
        apart = [(1, (1, p, 64)), (1, (n, length - p, 64))]
        if shared:
            later = [[(i, (1, p + 2, 64)), (i, (n, length - p, 64))] for i in (2, 3)]
            assert edit.seen == [(1, (1, p, 64)), (2, (1, p, 64)), (3, (1, p + 2, 64)), (4, (1, p + 2, 64))]
        else:
            later = [[(i, (n, length + 2, 64))] for i in (2, 3)]
            assert edit.seen == [(i, (n, length + 2 * (i > 2), 64)) for i in (1, 2, 3, 4)]
        assert adapters.seen == [*apart, *later[0], *later[1], (4, (n, 1, 64))]


def test_an_edit_is_not_asked_about_no_tokens(build_model, prompts):
    seen = []

    class Watch(BlockEdit):
        def project(self, number, which, x):
            seen.append(x.shape[1])

        def beside_mlp(self, number, x):
            seen.append(x.shape[1])

        def after(self, number, h):
            seen.append(h.shape[1])

    clip = CLIP(build_model("vit"))
    run(clip, "text", prompts, [Tokens("text", [1]), Watch()])
    assert seen and min(seen) == 1 and seen.count(1) == 3  # query, MLP and output of the last block


@pytest.mark.parametrize("side", ["visual", "text"])
def test_fp32_edits_of_a_half_precision_backbone(build_model, given, side):
    edits = CASES["everything"](side)
    want = run(CLIP(build_model("vit")), side, given[side], edits)
    got = run(CLIP(build_model("vit"), precision="bf16"), side, given[side], edits)
    assert got.dtype == torch.bfloat16
    assert torch.cosine_similarity(got.float(), want).min() > 0.99
    assert all(grad.isfinite().all() for grad in gradients(got.float(), edits))


# What is refused


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (Tokens("visual", [1]), r"Tokens \(tokens\)"),
        (Project(), r"Project \(project\)"),
        (Norms(INSIDE), r"Norms \(norm\)"),
    ],
)
def test_a_resnet_refuses_what_it_has_no_room_for(build_model, images, edit, named):
    visual = CLIP(build_model("resnet")).visual
    hidden = visual.prefix(images, 0)
    message = f"Expected a vision transformer for {{}} but the image encoder is a ResNet.*: got {named}"
    for act in (
        lambda: visual.check_edits([After(), edit]),
        lambda: visual.prefix(images, 0, [edit]),
        lambda: visual.suffix(hidden, 1, [edit]),
        lambda: visual.join(hidden, [edit], 1, hidden),
    ):
        with pytest.raises(ValueError, match=message.format("these edits")):
            act()
    with pytest.raises(ValueError, match=message.format("MaPLe")):
        visual.check_edits([edit], "MaPLe")


def test_a_resnet_takes_the_others_in_their_order(oracle, build_model, images):
    model, seen = build_model("resnet"), []

    class Watch(BlockEdit):
        def parallel(self, number, x):
            seen.append(x)
            return torch.ones_like(x) if number == 2 else None

        def beside_mlp(self, number, x):
            seen.append(x)
            return torch.ones_like(x) if number == 2 else None

        def after(self, number, h):
            seen.append(h)

    clip = CLIP(model)
    clip.visual.suffix(clip.visual.prefix(images, 1), 2, [Watch()])
    assert torch.equal(seen[1], seen[0] + 1) and torch.equal(seen[2], seen[1] + 1)
    assert len(seen) == 3 * (clip.visual.depth - 1)


def test_branches_part_only_where_edits_are_outside_the_block(build_model, given):
    clip = CLIP(build_model("vit"))
    seen, out = clip.visual.enter(clip.visual.prefix(given["visual"], 1), 2)
    seen_text, out_text = clip.text.enter(clip.text.prefix(clip.text.tokenise(given["text"]), 1))
    for edit in (Tokens("visual", [2]), Project(), BesideMLP(), Norms(INSIDE)):
        message = (
            f"Expected edits beside or behind a block that was entered without edits but got {type(edit).__name__}"
        )
        with pytest.raises(ValueError, match=message):
            clip.visual.join(out, [Parallel(), edit], 2, seen)
        with pytest.raises(ValueError, match=message):
            clip.text.join(out_text, [edit], seen_text)
    edits = [Parallel(), After()]
    joined = clip.visual.join(out, edits, 2, seen)
    want = clip.visual.suffix(clip.visual.prefix(given["visual"], 1), 2, edits)
    torch.testing.assert_close(clip.visual.suffix(joined, 3, edits), want)


def test_what_is_no_list_of_edits_is_refused(build_model):
    clip = CLIP(build_model("vit"))
    for tower in (clip.visual, clip.text):
        with pytest.raises(ValueError, match="Expected every edit to be a BlockEdit but got function"):
            tower.check_edits([lambda number, x: x])
        with pytest.raises(ValueError, match="Expected a list of edits but got one edit, Parallel"):
            tower.check_edits(Parallel())


@pytest.mark.parametrize("side", ["visual", "text"])
@pytest.mark.parametrize("wrong", [lambda x: None, lambda x: x[:1], lambda x: x[..., :5], lambda x: x[0]])
def test_tokens_of_a_wrong_shape_are_refused(build_model, given, side, wrong):
    class Wrong(BlockEdit):
        def tokens(self, number, x: Tensor):
            return wrong(x) if number == 2 else x

    with pytest.raises(ValueError, match=r"Wrong.tokens to return shape \(3, any, 64\) before block 2 but got"):
        run(CLIP(build_model("vit")), side, given[side], [Wrong()])


@pytest.mark.parametrize("edit", [Parallel, BesideMLP, After, Project])
def test_additions_of_a_wrong_shape_are_refused(build_model, images, edit):
    kind = {Parallel: "parallel", BesideMLP: "beside_mlp", After: "after", Project: "project"}[edit]

    class Wrong(edit):
        pass

    setattr(Wrong, kind, lambda self, number, *seen: seen[-1][:, :1])
    with pytest.raises(
        ValueError, match=rf"Wrong.{kind} to return shape \(3, 17, 64\) for block 1 but got \(3, 1, 64\)"
    ):
        run(CLIP(build_model("vit")), "visual", images, [Wrong()])


def test_kinds_are_what_a_class_overrides():
    class Both(After):
        def norm(self, number, which, norm):
            return None

    assert kinds(BlockEdit()) == frozenset()
    assert kinds(Both()) == {"after", "norm"}
    assert set().union(*(kinds(edit) for edit in CASES["everything"]("text"))) == set(KINDS)
    plain = BlockEdit()
    x = torch.ones(1, 2, 3)
    assert plain.tokens(1, x) is x
    given = [plain.project(1, "q", x), plain.parallel(1, x), plain.beside_mlp(1, x), plain.after(1, x)]
    assert given == [None] * 4 and plain.norm(1, "ln_1", nn.LayerNorm(3)) is None

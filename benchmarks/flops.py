"""The matrix products that a training step or an evaluation pass of DLR-CLIP must do, counted from the shapes alone.

A count is a list of `Product`s, each with the part of the step it belongs to. Elementwise work (normalization,
activations, softmax, the optimizer) is not counted: it does few operations, and what time it takes is what stands
between a measured step and its floor. Attention's backward pass is counted as four products, two for each forward
one; what a kernel computes again on top is not needed and not counted.

Legend: B images, N tokens of an image, C classes, L tokens of a prompt (P of them shared by all prompts), D width,
H heads, E joint embedding, r bottleneck width of the adapter, d feature size of the logit refiner.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Product:
    """`times` times a product of [m, k] and [k, n], or of `batch` such pairs at once. 2 m k n batch FLOPs each."""

    part: str
    m: int
    k: int
    n: int
    batch: int = 1
    times: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n * self.batch * self.times

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, m, k, n)."""
        return self.batch, self.m, self.k, self.n


@dataclass(frozen=True)
class Tower:
    """Sizes of a transformer: blocks, width D, heads H, hidden width of the MLP."""

    depth: int
    width: int
    heads: int
    hidden: int


@dataclass(frozen=True)
class Sizes:
    """All sizes that a step's products depend on.

    Attributes:
        visual, text: the two towers.
        tokens: N. patch: numbers in a patch, 3 p^2. embed: E.
        batch: B. classes: C.
        length: L of a prompt. shared: P. context: tokens of a prompt that is not cut.
        visual_start, text_start: first adapted block of each tower; the last adapted one is the last block.
        dim: r. refiner: d. fusion: hidden width of the fusion gate.
    """

    visual: Tower
    text: Tower
    tokens: int
    patch: int
    embed: int
    batch: int
    classes: int
    length: int
    shared: int
    context: int = 77
    visual_start: int = 5
    text_start: int = 5
    dim: int = 32
    refiner: int = 512
    fusion: int = 128


def sizes_of(network: Any, batch: int) -> Sizes:
    """The sizes of a `DLRCLIPNetwork` on a ViT with all three parts on, whose prompts are all of one length."""
    clip, learner = network.clip, network.learner
    tokens = clip.text.tokenise([f"{network.context} {name.replace('_', ' ')}." for name in network.classnames])
    if int(tokens.eot.min()) != int(tokens.eot.max()):
        raise ValueError("Expected prompts of one length but got several")
    block, word_block = clip.visual.visual.transformer.resblocks[0], clip.text.transformer.resblocks[0]
    patch = clip.visual.visual.conv1
    return Sizes(
        visual=Tower(clip.visual.depth, clip.visual.width, block.attn.num_heads, block.mlp.c_fc.out_features),
        text=Tower(clip.text.depth, clip.text.width, word_block.attn.num_heads, word_block.mlp.c_fc.out_features),
        tokens=clip.visual.visual.positional_embedding.shape[0],
        patch=patch.weight[0].numel(),
        embed=clip.embed_dim,
        batch=batch,
        classes=len(network.classnames),
        length=int(tokens.eot[0]) + 1,
        shared=tokens.shared,
        context=clip.text.context_length,
        visual_start=min(map(int, learner.cma.visual)),
        text_start=min(map(int, learner.cma.text)),
        dim=next(iter(learner.cma.visual.values())).down.out_features,
        refiner=learner.glr.norm.normalized_shape[0],
        fusion=learner.fusion.layers[0].out_features,
    )


@dataclass
class _Tally:
    """Collects products; `forward` and `backward` name the parts that they are put under."""

    forward: str
    backward: str = ""
    products: list[Product] = field(default_factory=list)

    def add(self, part: str, m: int, k: int, n: int, batch: int = 1) -> None:
        if part and min(m, k, n, batch) > 0:
            self.products.append(Product(part, m, k, n, batch))

    def linear(self, rows: int, k: int, n: int, to_input: bool = False, to_weight: bool = False) -> None:
        """[rows, k] @ [k, n], and the gradients of its input and its weight where they are wanted."""
        self.add(self.forward, rows, k, n)
        if to_input:
            self.add(self.backward, rows, n, k)
        if to_weight:
            self.add(self.backward, n, rows, k)

    def attention(self, sequences: int, queries: int, keys: int, tower: Tower, grad: bool) -> None:
        batch, d = sequences * tower.heads, tower.width // tower.heads
        self.add(self.forward, queries, d, keys, batch)  # scores
        self.add(self.forward, queries, keys, d, batch)  # mixing
        if grad:
            self.add(self.backward, keys, queries, d, batch)  # values
            self.add(self.backward, queries, d, keys, batch)  # probabilities
            self.add(self.backward, queries, keys, d, batch)  # queries
            self.add(self.backward, keys, queries, d, batch)  # keys

    def block(self, tower: Tower, sequences: int, queries: int, own: int, keys: int, grad: bool) -> None:
        """A block without adapter: `queries` of each sequence's `own` tokens look at `keys` tokens."""
        width, rows = tower.width, sequences * queries
        if queries == own:
            self.linear(rows, width, 3 * width, grad)
        else:
            self.linear(rows, width, width, grad)
            self.linear(sequences * own, width, 2 * width, grad)
        self.attention(sequences, queries, keys, tower, grad)
        self.linear(rows, width, width, grad)
        self.linear(rows, width, tower.hidden, grad)
        self.linear(rows, tower.hidden, width, grad)

    def adapter(self, rows: int, width: int, dim: int, grad: bool) -> None:
        """down, shared and up, and their gradients; `grad`: also that of what the adapter sees."""
        self.linear(rows, width, dim, grad, to_weight=True)
        self.linear(rows, dim, dim, to_input=True, to_weight=True)
        self.linear(rows, dim, width, to_input=True, to_weight=True)

    def image_block(self, s: Sizes, number: int, plain: bool = True, adapted: bool = False, grad: bool = False) -> None:
        """Block `number`, the last one for the class token alone; without its `plain` part the adapter only."""
        queries = 1 if number == s.visual.depth else s.tokens
        if plain:
            self.block(s.visual, s.batch, queries, s.tokens, s.tokens, grad)
        if adapted:
            self.adapter(s.batch * queries, s.visual.width, s.dim, grad)

    def text_block(self, s: Sizes, number: int, plain: bool, grad: bool) -> None:
        """An adapted block: cut prompts, shared leading tokens, the last one for the end-of-text tokens alone."""
        own, width = s.length - s.shared, s.text.width
        last = number == s.text.depth
        queries = 1 if last else own
        if plain:
            if last:
                self.linear(s.shared, width, 2 * width, grad)
            else:
                self.block(s.text, 1, s.shared, s.shared, s.shared, grad)
            self.block(s.text, s.classes, queries, own, s.length, grad)
        if not last:
            self.adapter(s.shared, width, s.dim, grad)
        self.adapter(s.classes * queries, width, s.dim, grad)

    def full_text(self, s: Sizes, adapted: bool) -> None:
        """The whole text encoder on prompts that are not cut."""
        for number in range(1, s.text.depth + 1):
            grad = adapted and number > s.text_start
            self.block(s.text, s.classes, s.context, s.context, s.context, grad)
            if adapted and number >= s.text_start:
                self.adapter(s.classes * s.context, s.text.width, s.dim, grad)
        self.linear(s.classes, s.text.width, s.embed, adapted)

    def patches(self, s: Sizes) -> None:
        self.linear(s.batch * (s.tokens - 1), s.patch, s.visual.width)

    def projection(self, s: Sizes, grad: bool = False) -> None:
        self.linear(s.batch, s.visual.width, s.embed, grad)

    def heads(self, s: Sizes, backward: bool) -> None:
        """The logits of both branches, the refiner and the fusion gate."""
        b, c, d = s.batch, s.classes, s.refiner
        self.linear(b, s.embed, c)
        self.linear(b, s.embed, c, backward, backward)
        self.linear(b, c, d, False, backward)  # the zero-shot logits have no gradient
        self.linear(b, c, d, backward, backward)
        for _ in range(2):
            self.linear(b, d, max(1, d // 8), backward, backward)
            self.linear(b, max(1, d // 8), d, backward, backward)
        self.linear(b, d, max(1, d // 4), backward, backward)
        self.linear(b, max(1, d // 4), 1, backward, backward)
        self.linear(b, d, c, backward, backward)
        self.linear(b, c, s.fusion, backward, backward)
        self.linear(b, s.fusion, 1, backward, backward)


def _adapted_image(s: Sizes, train: bool) -> list[Product]:
    """From the output of the first adapted block, which lacks its adapter's part, on."""
    tally = _Tally("adapted suffix forward", "adapted suffix backward" if train else "")
    for number in range(s.visual_start, s.visual.depth + 1):
        later = number > s.visual_start  # what enters the first adapted block has no gradient
        tally.image_block(s, number, plain=later, adapted=True, grad=later)
    tally.projection(s, grad=True)
    return tally.products


def _adapted_text(s: Sizes, train: bool) -> list[Product]:
    """As `_adapted_image`; of the first adapted block all but the adapter is a constant of the class list."""
    tally = _Tally("text suffix forward", "text suffix backward" if train else "")
    for number in range(s.text_start, s.text.depth + 1):
        later = number > s.text_start
        tally.text_block(s, number, plain=later, grad=later)
    tally.linear(s.classes, s.text.width, s.embed, to_input=True)
    return tally.products


def _prefix(s: Sizes, kept: bool = False) -> list[Product]:
    """From the images through the first adapted block, of which all but the adapter is common to both branches.

    `kept`: what enters that block is there already.
    """
    tally = _Tally("image prefix")
    if not kept:
        tally.patches(s)
    for number in range(s.visual_start if kept else 1, s.visual_start + 1):
        tally.image_block(s, number)
    return tally.products


def _plain(s: Sizes) -> list[Product]:
    tally = _Tally("plain suffix")
    for number in range(s.visual_start + 1, s.visual.depth + 1):
        tally.image_block(s, number)
    tally.projection(s)
    return tally.products


def _heads(s: Sizes, train: bool) -> list[Product]:
    tally = _Tally("heads", "heads" if train else "")
    tally.heads(s, backward=train)
    return tally.products


def fresh_step(s: Sizes) -> list[Product]:
    """A training step on images that were augmented afresh."""
    return _prefix(s) + _plain(s) + _adapted_image(s, True) + _adapted_text(s, True) + _heads(s, True)


def views_step(s: Sizes) -> list[Product]:
    """A training step on views of which what enters the first adapted block and the zero-shot features are kept."""
    return _prefix(s, kept=True) + _adapted_image(s, True) + _adapted_text(s, True) + _heads(s, True)


def _whole_image_pass(s: Sizes, forward: str, backward: str = "", adapted: bool = False) -> list[Product]:
    tally = _Tally(forward, backward)
    tally.patches(s)
    for number in range(1, s.visual.depth + 1):
        grad = adapted and number > s.visual_start
        tally.block(s.visual, s.batch, s.tokens, s.tokens, s.tokens, grad)
        if adapted and number >= s.visual_start:
            tally.adapter(s.batch * s.tokens, s.visual.width, s.dim, grad)
    tally.projection(s, grad=adapted)
    return tally.products


def naive_step(s: Sizes, passes: int = 3) -> list[Product]:
    """A training step as published: `passes` whole image passes, the adapted one among them, and uncut prompts."""
    text = _Tally("text forward", "text backward")
    text.full_text(s, adapted=True)
    return (
        _whole_image_pass(s, "zero-shot pass")
        + (_whole_image_pass(s, "teacher pass") if passes == 3 else [])
        + _whole_image_pass(s, "adapted pass forward", "adapted pass backward", adapted=True)
        + text.products
        + _heads(s, True)
        + ([Product("heads", s.batch, s.embed, s.classes)] if passes == 3 else [])  # the teacher's logits
    )


def _batches(s: Sizes, images: int) -> list[Sizes]:
    """One entry per batch of an evaluation pass; the last may be smaller."""
    return [replace(s, batch=min(s.batch, images - done)) for done in range(0, images, s.batch)]


def naive_eval(s: Sizes, images: int) -> list[Product]:
    """An evaluation pass as published: per batch two whole image passes and all uncut prompts."""
    products = []
    for batch in _batches(s, images):
        text = _Tally("text forward")
        text.full_text(batch, adapted=True)
        products += _whole_image_pass(batch, "zero-shot pass")
        products += _whole_image_pass(batch, "adapted pass forward", adapted=True)
        products += text.products + _heads(batch, False)
    return products


def our_eval(s: Sizes, images: int, prefix: bool = True, plain: bool = True) -> list[Product]:
    """An evaluation pass: the text features once, then the images.

    Args:
        prefix: whether the image prefix is to be computed (False: kept from an earlier pass).
        plain: whether the zero-shot branch is (False: its features are kept).
    """
    products = _adapted_text(s, False)
    for batch in _batches(s, images):
        products += _prefix(batch, kept=not prefix)
        products += _plain(batch) if plain else []
        products += _adapted_image(batch, False) + _heads(batch, False)
    return products


def by_part(products: Iterable[Product]) -> dict[str, int]:
    """FLOPs of each part, in order of appearance."""
    parts: dict[str, int] = {}
    for product in products:
        parts[product.part] = parts.get(product.part, 0) + product.flops
    return parts


def total(products: Iterable[Product]) -> int:
    """FLOPs of all products."""
    return sum(product.flops for product in products)

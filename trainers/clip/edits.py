"""Edits of CLIP's blocks: what methods insert into a tower, replace in it, or add to what its blocks compute.

A transformer block with every edit, for the tokens x that would enter it:

    x   <- tokens(x)
    n    = ln_1(x)                                        gain and bias from norm
    x'   = x + attention(q + project("q", n), k + project("k", n), v + project("v", n))
    h    = x' + mlp(ln_2(x')) + beside_mlp(x') + parallel(n)
    out  = h + after(h)

Legend: B images or N prompts, L tokens, D width of a block, C channels of a ResNet's block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("tokens", "project", "parallel", "beside_mlp", "after", "norm")
"""Names of the methods of a BlockEdit that a tower may call."""

INSIDE = ("tokens", "project", "beside_mlp", "norm")
"""Those of KINDS that change what a transformer block computes; the others only add to the block's output."""


class BlockEdit:
    """Change what blocks see or give; every method does nothing unless a subclass overrides it.

    A subclass may be an ``nn.Module`` too. Blocks are numbered from 1. A tower calls the methods that a class overrides
    for every block that the tower runs. For a block that the edit leaves alone, they return what they return here.
    Several edits apply in the order of their list: ``tokens`` and ``after`` see what the edits before them made, the
    other methods do not. What is added has any floating dtype, and the shape of what the method was given.

    With checkpointing a block is computed twice, so its edits must return the same both times.

    Attributes:
        first_block: the first block that the edit changes. Callers compute once what comes before it.
        leading: for the text tower: ``tokens`` changes at most the first ``leading`` positions, in the same way in
            every prompt, so that prompts go on sharing their beginning (see text.py). None: ``tokens`` may change any
            position of any prompt.
    """

    first_block: int = 1
    leading: int | None = None

    def tokens(self, number: int, x: Tensor) -> Tensor:
        """Return the tokens that enter a block in place of ``x``, with some inserted or replaced.

        Args:
            number: number of the block.
            x: [B, L, D]. Image tower: the class token is first and has to stay there. Text tower: whole prompts
                (with ``leading``: their shared tokens alone, as one prompt). There, tokens are to be inserted behind
                the start of text and before every end of text, the same number in all prompts.

        Returns:
            [B, L', D]; ``x`` itself if nothing is changed. Before block 1, ``x`` already has its position embeddings
            and has been through ln_pre. An edit that wants this for its own tokens has to do it (``layer_norm``).
        """
        return x

    def project(self, number: int, which: str, x: Tensor) -> Tensor | None:
        """Return what to add to the queries ("q"), keys ("k") or values ("v") of a block; None adds nothing.

        Args:
            number: number of the block.
            which: "q", "k" or "v".
            x: ln_1 of the tokens [B, L, D], or of any subset of them: the method has to work token by token.
        """
        return None

    def parallel(self, number: int, x: Tensor) -> Tensor | None:
        """Return what to add to a block's output, computed from what enters the block; None adds nothing.

        Args:
            number: number of the block.
            x: ln_1 of the tokens [B, L, D], or of any subset of them. ResNet: the block's output [B, C, H, W].
        """
        return None

    def beside_mlp(self, number: int, x: Tensor) -> Tensor | None:
        """Return what to add to a block's output, computed from what enters the block's MLP; None adds nothing.

        Args:
            number: number of the block.
            x: what enters ln_2, [B, L, D], for any subset of the tokens. ResNet: as for ``after``.
        """
        return None

    def after(self, number: int, h: Tensor) -> Tensor | None:
        """Return what to add to a block's output, computed from this output; None adds nothing.

        Args:
            number: number of the block.
            h: the output [B, L, D], for any subset of the tokens. ResNet: [B, C, H, W].
        """
        return None

    def norm(self, number: int, which: str, norm: nn.LayerNorm) -> tuple[Tensor, Tensor] | None:
        """Return the gain and the bias [D] that replace those of a LayerNorm; None keeps its own.

        If several edits replace those of the same LayerNorm, the last one counts.

        Args:
            number: number of the block; 0 for "ln_pre", and that of the last block + 1 for "ln_post" and "ln_final".
            which: "ln_1" or "ln_2" of a block, "ln_pre" or "ln_post" of the image tower, "ln_final" of the text tower.
            norm: the LayerNorm.
        """
        return None


def kinds(edit: BlockEdit) -> frozenset[str]:
    """Return the names of the methods in KINDS that an edit overrides."""
    return frozenset(name for name in KINDS if getattr(type(edit), name) is not getattr(BlockEdit, name))


class Edits:
    """Sort a list of edits by the methods that they override, and apply them.

    Args:
        edits: in the order in which they apply.

    Raises:
        ValueError: ``edits`` is a single edit instead of a list, or holds something that is no BlockEdit.
    """

    def __init__(self, edits: Sequence[BlockEdit] = ()) -> None:
        if isinstance(edits, BlockEdit):
            raise ValueError(f"Expected a list of edits but got one edit, {type(edits).__name__}, that is in no list")
        self.edits = tuple(edits)
        for edit in self.edits:
            if not isinstance(edit, BlockEdit):
                raise ValueError(f"Expected every edit to be a BlockEdit but got {type(edit).__name__}")
        self.tokens = self._overriding("tokens")
        self._project = self._overriding("project")
        self._parallel = self._overriding("parallel")
        self._beside_mlp = self._overriding("beside_mlp")
        self._after = self._overriding("after")
        self._norm = self._overriding("norm")

    def _overriding(self, kind: str) -> list[BlockEdit]:
        return [edit for edit in self.edits if kind in kinds(edit)]

    def enter(self, number: int, x: Tensor) -> Tensor:
        """Return the tokens [B, L', D] that enter a block after the edits have changed x [B, L, D]."""
        for edit in self.tokens:
            x = edit_tokens(edit, number, x)
        return x

    def normalize(self, norm: nn.Module, x: Tensor, number: int, which: str) -> Tensor:
        """Apply a LayerNorm to x with the gain and bias that the edits give the LayerNorm; see ``layer_norm``."""
        if not self._norm or not isinstance(norm, nn.LayerNorm):
            return layer_norm(norm, x)
        given: tuple[Tensor, ...] = ()
        for edit in self._norm:
            replacement = edit.norm(number, which, norm)
            given = given if replacement is None else replacement
        return layer_norm(norm, x, *given)

    def project(self, out: Tensor, number: int, which: str, x: Tensor) -> Tensor:
        """Return ``out``, the queries, keys or values of the tokens x, plus what edits add; all are [B, L, D]."""
        for edit in self._project:
            out = _add(out, edit.project(number, which, x), edit, "project", number)
        return out

    def beside_mlp(self, out: Tensor, number: int, x: Tensor) -> Tensor:
        """Return a block's output plus what edits compute from x, which enters ln_2."""
        for edit in self._beside_mlp:
            out = _add(out, edit.beside_mlp(number, x), edit, "beside_mlp", number)
        return out

    def parallel(self, out: Tensor, number: int, x: Tensor) -> Tensor:
        """Return a block's output plus what edits compute from x: ln_1 of the tokens, or a ResNet block's output."""
        for edit in self._parallel:
            out = _add(out, edit.parallel(number, x), edit, "parallel", number)
        return out

    def after(self, out: Tensor, number: int) -> Tensor:
        """Return a block's output plus what edits compute from the output."""
        for edit in self._after:
            out = _add(out, edit.after(number, out), edit, "after", number)
        return out

    def check_outside(self, inside: Sequence[str]) -> None:
        """Refuse edits inside a block that has already run without edits.

        Only the output of such a block can still be edited.

        Args:
            inside: names of the methods that no edit may override here.

        Raises:
            ValueError: an edit overrides one of these methods.
        """
        found = self.making(inside)
        if found:
            raise ValueError(f"Expected edits beside or behind a block that was entered without edits but got {found}")

    def making(self, names: Sequence[str]) -> str:
        """List for a message which edits override these methods: "A (tokens), B (tokens, norm)", or "" if none does."""
        found = [(edit, [name for name in names if name in kinds(edit)]) for edit in self.edits]
        return ", ".join(f"{type(edit).__name__} ({', '.join(own)})" for edit, own in found if own)


def edit_tokens(edit: BlockEdit, number: int, x: Tensor) -> Tensor:
    """Return the tokens that one edit makes of x [B, L, D] before a block, in x's dtype.

    The result is x itself if the edit changes nothing.

    Raises:
        ValueError: the edit returns no tensor, or one whose shape differs from x's in more than L.
    """
    out = edit.tokens(number, x)
    if not isinstance(out, Tensor) or out.ndim != 3 or (out.shape[0], out.shape[2]) != (x.shape[0], x.shape[2]):
        came = tuple(out.shape) if isinstance(out, Tensor) else out
        raise ValueError(
            f"Expected {type(edit).__name__}.tokens to return shape ({x.shape[0]}, any, {x.shape[2]}) before block "
            f"{number} but got {came}"
        )
    return out.to(x.dtype)


def layer_norm(norm: nn.Module, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Apply a LayerNorm in its weights' dtype (fp32 in a half-precision backbone) and return ``x``'s dtype.

    Args:
        norm: the LayerNorm.
        x: [..., D].
        weight, bias: [D], used instead of the LayerNorm's own; None: the LayerNorm's own.
    """
    if not isinstance(norm, nn.LayerNorm):  # nn.Identity if an architecture leaves the norm out
        return norm(x)
    weight, bias = norm.weight if weight is None else weight, norm.bias if bias is None else bias
    return F.layer_norm(x.to(weight.dtype), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)


def norms_of_blocks(blocks: Iterable[Any]) -> dict[tuple[int, str], nn.Module]:
    """Return both norms of each transformer block, by the block's number and their names."""
    return {(i, which): getattr(block, which) for i, block in enumerate(blocks, 1) for which in ("ln_1", "ln_2")}


def layer_norms(norms: Mapping[tuple[int, str], nn.Module]) -> dict[tuple[int, str], nn.LayerNorm]:
    """Return those norms that are LayerNorms, in order; an architecture may leave some out."""
    return {place: norm for place, norm in sorted(norms.items()) if isinstance(norm, nn.LayerNorm)}


def _add(out: Tensor, extra: Tensor | None, edit: BlockEdit, kind: str, number: int) -> Tensor:
    if extra is None:
        return out
    if extra.shape != out.shape:
        raise ValueError(
            f"Expected {type(edit).__name__}.{kind} to return shape {tuple(out.shape)} for block {number} but got "
            f"{tuple(extra.shape)}"
        )
    return out + extra.to(out.dtype)

"""CLIP's text encoder as blocks that can be run from anywhere to anywhere, with or without edits (edits.py).

Two savings are exact, because attention is causal and only the end-of-text token is read:
* tokens after a prompt's end-of-text token change nothing, so the matrix is cut at the longest prompt;
* tokens that all prompts begin with ("<start> a photo of a") have the same activations for every prompt at every
  block, edits included, so they are computed once and each prompt's own tokens attend to their keys and values; on a
  GPU only where that saves enough tokens (``SHARING_COST``).

Edits of tokens end the sharing: the first block whose tokens change, and all blocks behind it, are computed for whole
prompts. An edit that changes only leading tokens, in the same way in every prompt (``BlockEdit.leading``), keeps the
sharing if all the tokens that it changes are shared: the edit then gets the shared tokens once.

Legend: N prompts, L tokens of the longest prompt, P shared leading tokens, D width, E joint embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from .blocks import finish_block, mix, pick_tokens, project_kv, project_q, project_qkv, recompute
from .edits import INSIDE, BlockEdit, Edits, edit_tokens, layer_norms, norms_of_blocks

logger = logging.getLogger(__name__)

# Tokens that sharing must save, by type of device; 0 where it is not listed. Sharing needs a second set of kernels in
# each block. On a GPU, launching these takes longer than computing some hundred tokens more.
SHARING_COST = {"cuda": 1024}


def count_shared(shared: int, prompts: int, device: torch.device) -> int:
    """Return how many leading tokens to compute once: those that all prompts have in common, or 0 if it saves too few.

    Args:
        shared: P, leading tokens that are the same in all prompts.
        prompts: N.
        device: where they are encoded.
    """
    return shared if (prompts - 1) * shared >= SHARING_COST.get(device.type, 0) else 0


@dataclass(frozen=True)
class PromptTokens:
    """Tokenized prompts.

    Attributes:
        ids: token ids [N, L], zero after each prompt's end-of-text token.
        eot: position of each prompt's end-of-text token [N].
        shared: P, how many leading tokens are the same in all prompts, start-of-text among them, and never reaching an
            end-of-text token, so that every prompt keeps a token of its own to read (also when there is one prompt).
            0 shares nothing: where it saves too little (``count_shared``), or where a caller replaces P.
    """

    ids: Tensor
    eot: Tensor
    shared: int

    def take(self, rows: Tensor) -> PromptTokens:
        """Return the prompts of these rows [n] alone, cut at the longest of them; n is at least 1."""
        eot = self.eot[rows]
        return PromptTokens(self.ids[rows, : int(eot.max()) + 1], eot, self.shared)


@dataclass(frozen=True)
class TextState:
    """Activations entering block ``next_block``.

    Attributes:
        shared: the shared leading tokens [1, P, D].
        own: each prompt's remaining tokens [N, L - P, D].
        eot: position of the end-of-text token within ``own`` [N].
        next_block: number of the block that these activations enter.
    """

    shared: Tensor
    own: Tensor
    eot: Tensor
    next_block: int


def count_tokens(texts: Sequence[str]) -> list[int]:
    """Return how many tokens of CLIP's vocabulary each text has, start and end of text among them; nothing is cut."""
    room = max(len(text.encode()) for text in texts) * 4 + 2  # a token is a byte at least; cleaning may add some
    return (open_clip.tokenize(list(texts), context_length=room).argmax(dim=-1) + 1).tolist()


class TextTower(nn.Module):
    """A causal text transformer cut into blocks numbered from 1, read out at the end-of-text token.

    Attributes:
        depth: number of blocks.
        width: D.
        widths: block number -> D.
        context_length: most tokens a prompt may have.
        embed_dim: E.
    """

    def __init__(self, model: Any) -> None:
        """Take over the text encoder of an open_clip CLIP.

        Args:
            model: open_clip's CLIP (the text encoder's parameters lie at its top level).

        Raises:
            ValueError: the text encoder is not a plain causal one that is read out at its end-of-text token.
        """
        super().__init__()
        if model.text_pool_type != "argmax" or not isinstance(model.text_projection, nn.Parameter):
            raise ValueError("Expected a causal text encoder read out at its end-of-text token, with a bias-free head")
        if not isinstance(model.transformer.resblocks[0].attn, nn.MultiheadAttention):
            raise ValueError("Expected a text encoder with plain attention blocks")
        self.token_embedding = model.token_embedding
        self.positional_embedding = model.positional_embedding
        self.transformer = model.transformer
        self.ln_final = model.ln_final
        self.text_projection = model.text_projection
        self.depth = len(model.transformer.resblocks)
        self.width = int(model.transformer.width)
        self.widths = {i: self.width for i in range(1, self.depth + 1)}
        self.context_length = int(model.positional_embedding.shape[0])
        self.embed_dim = int(model.text_projection.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the blocks."""
        return self.text_projection.dtype

    def tokenise(self, prompts: Sequence[str]) -> PromptTokens:
        """Tokenize prompts with CLIP's byte-pair vocabulary and put them on the tower's device.

        The matrix of tokens is cut at the longest prompt. A prompt longer than the context is cut to the context's
        length (its last token becomes end-of-text) with a warning.

        Raises:
            ValueError: ``prompts`` is empty, or one text instead of a list.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"Expected prompts to be a non-empty list of strings but got {prompts!r}")
        ids = open_clip.tokenize(list(prompts), context_length=self.context_length)  # [N, context], zero padded
        eot = ids.argmax(dim=-1)  # end-of-text has the highest id
        longest = int(eot.max())
        if longest == self.context_length - 1:
            counts = count_tokens(prompts)
            most = max(range(len(counts)), key=counts.__getitem__)
            if counts[most] > self.context_length:
                logger.warning(
                    "%d prompts of more than %d tokens are cut, the longest has %d: %r",
                    sum(count > self.context_length for count in counts),
                    self.context_length,
                    counts[most],
                    prompts[most],
                )
        ids = ids[:, : longest + 1]
        same = (ids == ids[:1]).all(dim=0).long().cumprod(dim=0)  # [L], 1 up to the first column that differs
        shared = min(int(same.sum()), int(eot.min()))
        device = self.positional_embedding.device
        return PromptTokens(ids.to(device), eot.to(device), count_shared(shared, len(ids), device))

    def embed(self, tokens: PromptTokens) -> TextState:
        """Return the token embeddings plus position embeddings, which enter block 1."""
        ids, p = tokens.ids, tokens.shared
        position = self.positional_embedding[: ids.shape[1]].to(self.dtype)  # [L, D]
        shared = self.token_embedding(ids[:1, :p]).to(self.dtype) + position[:p]
        own = self.token_embedding(ids[:, p:]).to(self.dtype) + position[p:]
        return TextState(shared, own, tokens.eot - p, next_block=1)

    def prefix(self, tokens: PromptTokens, stop: int) -> TextState:
        """Run blocks 1..``stop`` and return what enters block ``stop + 1``.

        Args:
            tokens: from ``tokenise``.
            stop: 0..depth (0: the embeddings alone).
        """
        if not 0 <= stop <= self.depth:
            raise ValueError(f"Expected stop to be in 0..{self.depth} but got {stop}")
        return self._advance(self.embed(tokens), stop, Edits())

    def check_edits(self, edits: Sequence[BlockEdit], method: str = "") -> Edits:
        """Refuse anything but a list of BlockEdits, and return the edits sorted by the methods they override.

        The arguments are those of ``VisionTower.check_edits``; ``method`` is not used here.

        Raises:
            ValueError: no list of BlockEdits.
        """
        return Edits(edits)

    def norms(self) -> dict[tuple[int, str], nn.LayerNorm]:
        """Return the LayerNorms whose gain and bias an edit may replace; see ``VisionTower.norms``."""
        ends = {(self.depth + 1, "ln_final"): self.ln_final}
        return layer_norms({**norms_of_blocks(self.transformer.resblocks), **ends})

    def enter(self, state: TextState) -> tuple[TextState, TextState]:
        """Run the next block without edits, and return what ``parallel`` of that block sees and the block's output.

        ``suffix(join(output, edits, seen), number + 1, edits)`` goes on from there. In a frozen encoder, both returned
        states are constants of the prompts. The last block is computed for the end-of-text tokens alone:
        own [N, 1, D], shared [1, 0, D].
        """
        if state.next_block > self.depth:
            raise ValueError(f"Expected a state that enters a block but got one behind the last, {self.depth}")
        return self._plain(state, Edits(), state.next_block == self.depth)

    def join(self, out: TextState, edits: Sequence[BlockEdit], seen: TextState) -> TextState:
        """Add to a block's output what edits compute beside and behind the block.

        Args:
            out, seen: the block's output and what ``parallel`` sees, both from ``enter``.
            edits: as for ``suffix``.

        Raises:
            ValueError: an edit changes what is inside a block.
        """
        planned = self.check_edits(edits)
        planned.check_outside(INSIDE)
        return self._close(out, planned, seen)

    def suffix(
        self, state: TextState, start: int, edits: Sequence[BlockEdit] = (), checkpointing: bool = False
    ) -> Tensor:
        """Run blocks ``start``..depth and the head on what enters block ``start``.

        Args:
            state: from ``prefix(tokens, start - 1)``.
            start: 1..depth + 1 (depth + 1: the head alone).
            edits: see edits.py. Each block asks twice: for the shared tokens [1, P, D], if there are any, and for the
                prompts' own [N, L - P, D]. The last block asks for the end-of-text tokens alone, [N, 1, D], except for
                ``tokens`` and for what is added to keys and values. For ``tokens``, see the head of this file.
            checkpointing: keep only what enters each block, and compute the rest again in the backward pass.

        Returns:
            Text features [N, E], not normalized.
        """
        if start != state.next_block:
            raise ValueError(f"Expected start to be {state.next_block}, the block the state enters, but got {start}")
        planned = self.check_edits(edits)
        state = self._advance(state, self.depth, planned, checkpointing, read_out=True)
        read = pick_tokens(state.own, state.eot)[:, 0]
        return planned.normalize(self.ln_final, read, self.depth + 1, "ln_final") @ self.text_projection

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Return text features [N, E], not normalized, for N prompts."""
        return self.suffix(self.prefix(self.tokenise(prompts), 0), 1)

    def _advance(
        self, state: TextState, stop: int, edits: Edits, checkpointing: bool = False, read_out: bool = False
    ) -> TextState:
        """Run the blocks ``state.next_block``..``stop``.

        With ``read_out``, the tower's last block is computed for the end-of-text tokens alone.
        """
        for number in range(state.next_block, stop + 1):
            arguments = (state, edits, read_out and number == self.depth)
            state = recompute(self._block, *arguments) if checkpointing else self._block(*arguments)
        return state

    def _block(self, state: TextState, edits: Edits, read_out: bool) -> TextState:
        for edit in edits.tokens:
            state = _enter(edit, state)
        seen, out = self._plain(state, edits, read_out)
        return self._close(out, edits, seen)

    def _close(self, out: TextState, edits: Edits, seen: TextState) -> TextState:
        def close(y: Tensor, x: Tensor) -> Tensor:
            return edits.after(edits.parallel(y, seen.next_block, x), seen.next_block)

        shared = close(out.shared, seen.shared) if out.shared.shape[1] else out.shared
        return TextState(shared, close(out.own, seen.own), out.eot, out.next_block)

    def _plain(self, state: TextState, edits: Edits, read_out: bool) -> tuple[TextState, TextState]:
        """Run the next block with the edits inside the block, and return (ln_1 of what enters it, its output).

        Edits of tokens are not applied here. With ``read_out`` the block is computed for the end-of-text tokens alone,
        which are then ``own`` [N, 1, D]: only keys and values need the other tokens.
        """
        number, own, eot = state.next_block, state.own, state.eot
        block = self.transformer.resblocks[number - 1]
        attn, p, length = block.attn, state.shared.shape[1], own.shape[1]
        normed_shared = shared = state.shared
        if p:
            normed_shared = edits.normalize(block.ln_1, shared, number, "ln_1")
            if read_out:
                k_shared, v_shared = project_kv(attn, normed_shared, number, edits)
                shared, normed_shared = shared[:, :0], normed_shared[:, :0]
            else:
                q_shared, k_shared, v_shared = project_qkv(attn, normed_shared, number, edits)
                attended = mix(attn, q_shared, k_shared, v_shared, causal=True)
                shared = finish_block(block, shared, attended, number, edits)
        normed = edits.normalize(block.ln_1, own, number, "ln_1")
        mask = None  # causal
        if read_out:
            k, v = project_kv(attn, normed, number, edits)
            own, normed = pick_tokens(own, eot), pick_tokens(normed, eot)
            q = project_q(attn, normed, number, edits)
            mask = torch.arange(p + length, device=own.device) <= (eot + p).view(-1, 1, 1, 1)  # [N, 1, 1, L]
            eot = torch.zeros_like(eot)
        else:
            q, k, v = project_qkv(attn, normed, number, edits)
            if p:
                position = torch.arange(p + length, device=own.device)
                mask = position <= position[p:].unsqueeze(1)  # [L - P, L]: own token j sees what stands up to j
        if p:
            k, v = _prepend(k_shared, k), _prepend(v_shared, v)
        attended = mix(attn, q, k, v, mask=mask, causal=mask is None)
        own = finish_block(block, own, attended, number, edits)
        return TextState(normed_shared, normed, eot, number), TextState(shared, own, eot, number + 1)


def _enter(edit: BlockEdit, state: TextState) -> TextState:
    """Have an edit insert or replace tokens before the next block.

    If the edit changes only shared tokens, it gets these alone. Otherwise it gets whole prompts; if it changes them,
    no token is shared any more.
    """
    number, p = state.next_block, state.shared.shape[1]
    if edit.leading is not None and edit.leading <= p:
        return replace(state, shared=edit_tokens(edit, number, state.shared))
    x = _prepend(state.shared, state.own)  # [N, L, D]
    edited = edit_tokens(edit, number, x)
    if edited is x:
        return state
    return TextState(edited[:1, :0], edited, state.eot + (p + edited.shape[1] - x.shape[1]), number)


def _prepend(shared: Tensor, own: Tensor) -> Tensor:
    """Put the shared tokens [1, ..., P, d] in front of each prompt's own [N, ..., L - P, d].

    Returns:
        [N, ..., L, d].
    """
    return torch.cat([shared.expand(own.shape[0], *shared.shape[1:]), own], dim=-2)

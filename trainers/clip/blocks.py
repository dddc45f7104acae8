"""Run CLIP's residual attention block over open_clip's parameters, with room for edits (edits.py).

open_clip's own block forward always computes every token. Here the block is split into projection, mixing of tokens
and the rest, so that callers can reuse keys and values of tokens that are shared, or read out a single token.

Legend: B sequences, L tokens, M key tokens, D width, H heads, d = D / H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .edits import Edits


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, L, D] -> [B, H, L, d]


def project_qkv(attn: nn.MultiheadAttention, x: Tensor, number: int, edits: Edits) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, [B, H, L, d] each, of all tokens of ``x`` [B, L, D] in block ``number``."""
    q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    q = _split_heads(edits.project(q, number, "q", x), attn.num_heads)
    k = _split_heads(edits.project(k, number, "k", x), attn.num_heads)
    return q, k, _split_heads(edits.project(v, number, "v", x), attn.num_heads)


def project_q(attn: nn.MultiheadAttention, x: Tensor, number: int, edits: Edits) -> Tensor:
    """Return the queries alone, [B, H, L, d], of all tokens of ``x`` [B, L, D] in block ``number``."""
    width = attn.embed_dim
    q = F.linear(x, attn.in_proj_weight[:width], attn.in_proj_bias[:width])
    return _split_heads(edits.project(q, number, "q", x), attn.num_heads)


def project_kv(attn: nn.MultiheadAttention, x: Tensor, number: int, edits: Edits) -> tuple[Tensor, Tensor]:
    """Return keys and values alone, [B, H, L, d] each, of all tokens of ``x`` [B, L, D] in block ``number``."""
    width = attn.embed_dim
    k, v = F.linear(x, attn.in_proj_weight[width:], attn.in_proj_bias[width:]).chunk(2, dim=-1)
    k = _split_heads(edits.project(k, number, "k", x), attn.num_heads)
    return k, _split_heads(edits.project(v, number, "v", x), attn.num_heads)


def mix(
    attn: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Apply scaled dot-product attention and the output projection.

    Args:
        q: queries [B, H, L, d].
        k, v: keys and values [B, H, M, d].
        mask: bool, broadcastable to [B, H, L, M], True where a query may look; None: everywhere.
        causal: use a lower-triangular mask instead of ``mask`` (needs L = M).

    Returns:
        [B, L, D].
    """
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    out = out.transpose(1, 2).flatten(2)  # [B, H, L, d] -> [B, L, D]
    return F.linear(out, attn.out_proj.weight, attn.out_proj.bias)


class _QuickGELU(Function):
    """z * sigmoid(1.702 z), as silu(1.702 z) / 1.702.

    In this form autograd keeps one tensor of the MLP's hidden layer [..., 4 D] instead of two, and the backward pass
    reads that tensor once: the two factors cancel in the derivative, silu'(1.702 z).
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        scaled = 1.702 * z
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, scaled)


def feed_forward(mlp: Any, x: Tensor) -> Tensor:
    """Apply a block's MLP to x [..., D] and return [..., D]."""
    if not isinstance(mlp.gelu, QuickGELU):
        return mlp(x)
    hidden = mlp.c_fc(x)  # [..., 4 D]
    if hidden.requires_grad:
        return mlp.c_proj(_QuickGELU.apply(hidden))
    return mlp.c_proj(F.silu(hidden.mul_(1.702), inplace=True).mul_(1 / 1.702))


def finish_block(block: Any, x: Tensor, attended: Tensor, number: int, edits: Edits) -> Tensor:
    """Run the rest of a block after its attention: ``x' = x + attn``, then ``x' + mlp(ln_2(x'))``.

    Of the edits, ``norm`` of ln_2 and ``beside_mlp`` are applied here.

    Args:
        block: open_clip's ResidualAttentionBlock.
        x: tokens entering the block [B, L, D].
        attended: attention's output for the same tokens [B, L, D].
        number: number of the block.
        edits: see edits.py.
    """
    x = x + block.ls_1(attended)
    out = x + block.ls_2(feed_forward(block.mlp, edits.normalize(block.ln_2, x, number, "ln_2")))
    return edits.beside_mlp(out, number, x)


def pick_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Return token ``index[b]`` of each sequence b, [B, 1, D], for x [B, L, D] and index [B]."""
    return x[torch.arange(x.shape[0], device=x.device), index].unsqueeze(1)


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function(*args)`` and keep only its tensor arguments for the backward pass.

    The backward pass computes everything else again.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # nothing in CLIP is random

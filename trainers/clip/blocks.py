"""Forward of CLIP's residual attention block over open_clip's parameters, with room for an adapter.

open_clip's own block forward always computes every token. Here attention is split into projection, mixing and the
rest of the block, so that callers can reuse keys and values of tokens that are shared, or read out a single token.

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

Adapter = Callable[[int, Tensor], "Tensor | None"]
"""``adapter(i, x)``: what to add to the output of block ``i`` (numbered from 1), or None for nothing.

Transformer blocks hand over ``ln_1(x)`` [B, L, D], for any subset of the tokens, so an adapter works token by token;
residual convolution blocks hand over their output [B, C, H, W]. The result has the shape of what was handed over,
in any floating dtype.
"""

Projection = Callable[[int, str, Tensor], "Tensor | None"]
"""``projection(i, which, x)``: what to add to the queries ("q"), keys ("k") or values ("v") of block ``i`` (numbered
from 1), or None for nothing.

``x`` is ``ln_1`` of the tokens [B, L, D], for any subset of them, so it too works token by token. The result has the
shape of ``x``, in any floating dtype.
"""


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a LayerNorm in its weights' dtype (fp32 in a half-precision backbone) and return ``x``'s dtype."""
    if not isinstance(norm, nn.LayerNorm):  # nn.Identity where an architecture leaves the norm out
        return norm(x)
    out = F.layer_norm(x.to(norm.weight.dtype), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return out.to(x.dtype)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, L, D] -> [B, H, L, d]


def _add_projection(out: Tensor, projection: Projection | None, number: int, which: str, x: Tensor) -> Tensor:
    extra = projection(number, which, x) if projection is not None else None
    return out if extra is None else out + extra.to(out.dtype)


def project_qkv(
    attn: nn.MultiheadAttention, x: Tensor, number: int = 0, projection: Projection | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, L, d] of all tokens of ``x`` [B, L, D], in block ``number``."""
    q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    q = _split_heads(_add_projection(q, projection, number, "q", x), attn.num_heads)
    k = _split_heads(_add_projection(k, projection, number, "k", x), attn.num_heads)
    return q, k, _split_heads(_add_projection(v, projection, number, "v", x), attn.num_heads)


def project_q(attn: nn.MultiheadAttention, x: Tensor, number: int = 0, projection: Projection | None = None) -> Tensor:
    """Queries only, [B, H, L, d]."""
    width = attn.embed_dim
    q = F.linear(x, attn.in_proj_weight[:width], attn.in_proj_bias[:width])
    return _split_heads(_add_projection(q, projection, number, "q", x), attn.num_heads)


def project_kv(
    attn: nn.MultiheadAttention, x: Tensor, number: int = 0, projection: Projection | None = None
) -> tuple[Tensor, Tensor]:
    """Keys and values only, [B, H, L, d] each."""
    width = attn.embed_dim
    k, v = F.linear(x, attn.in_proj_weight[width:], attn.in_proj_bias[width:]).chunk(2, dim=-1)
    k = _split_heads(_add_projection(k, projection, number, "k", x), attn.num_heads)
    return k, _split_heads(_add_projection(v, projection, number, "v", x), attn.num_heads)


def mix(
    attn: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention and output projection.

    Args:
        q: queries [B, H, L, d].
        k, v: keys and values [B, H, M, d].
        mask: bool, broadcastable to [B, H, L, M], True where a query may look; None = everywhere.
        causal: lower-triangular mask instead (needs L = M).

    Returns:
        [B, L, D].
    """
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    out = out.transpose(1, 2).flatten(2)  # [B, H, L, d] -> [B, L, D]
    return F.linear(out, attn.out_proj.weight, attn.out_proj.bias)


class _QuickGELU(Function):
    """z * sigmoid(1.702 z), as silu(1.702 z) / 1.702.

    Autograd then keeps one tensor of the MLP's hidden layer [..., 4 D] and not two, and goes over it once backward:
    the two factors cancel in the derivative, silu'(1.702 z).
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
    """A block's MLP [..., D] -> [..., D]."""
    if not isinstance(mlp.gelu, QuickGELU):
        return mlp(x)
    hidden = mlp.c_fc(x)  # [..., 4 D]
    if hidden.requires_grad:
        return mlp.c_proj(_QuickGELU.apply(hidden))
    return mlp.c_proj(F.silu(hidden.mul_(1.702), inplace=True).mul_(1 / 1.702))


def add_adapter(out: Tensor, adapter: Adapter | None, number: int, seen: Tensor) -> Tensor:
    """``out + adapter(number, seen)`` in ``out``'s dtype; ``out`` itself where there is nothing to add."""
    extra = adapter(number, seen) if adapter is not None else None
    if extra is None:
        return out
    if extra.shape != out.shape:
        raise ValueError(
            f"Expected the adapter of block {number} to return shape {tuple(out.shape)} but got {tuple(extra.shape)}"
        )
    return out + extra.to(out.dtype)


def finish_block(block: Any, x: Tensor, attended: Tensor, beside: Adapter | None = None, number: int = 0) -> Tensor:
    """A block after its attention, without an adapter: ``x' = x + attn``, ``x' + mlp(ln_2(x'))``.

    Args:
        block: open_clip's ResidualAttentionBlock.
        x: tokens entering the block [B, L, D].
        attended: attention's output for the same tokens [B, L, D].
        beside: ``beside(number, x')`` is added too.
        number: of the block.
    """
    x = x + block.ls_1(attended)
    return add_adapter(x + block.ls_2(feed_forward(block.mlp, layer_norm(block.ln_2, x))), beside, number, x)


def pick_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Token ``index[b]`` of each sequence: [B, L, D], [B] -> [B, 1, D]."""
    return x[torch.arange(x.shape[0], device=x.device), index].unsqueeze(1)


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, keeping only its tensor arguments for the backward pass, which computes the rest again."""
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # nothing in CLIP is random

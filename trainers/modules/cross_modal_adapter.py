"""CMA, the cross-modal adapter of DLR-CLIP: a bottleneck beside each transformer block, tied between image and text.

Legend: B images, N tokens of an image or prompts, L text tokens, D width of a block, r bottleneck width.

Block i of an encoder, which without the adapter gives x' + mlp(ln_2(x')) with x' = x + attn(ln_1(x)), gives instead

    x' + mlp(ln_2(x')) + scale_i * up_i( relu( shared_i( relu( down_i( ln_1(x) ) ) ) ) )          D -> r -> r -> D

`down_i`, `up_i` and `scale_i` belong to one encoder; `shared_i` is ONE module that both encoders use, and is what
makes the adapter cross-modal. Every token is adapted.

Gradient scaling (Yang et al., MMA, 2024; optional here): in the backward pass the gradient of an adapter's output is
multiplied by 1 / scale when it enters the adapter and by scale when it leaves it. What lies before the adapter gets the
true gradient; the adapter's own weights, shared ones included, get 1 / scale times theirs, as if scale were 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clip import CLIP, BlockEdit


def share_in_order(visual_blocks: list[int], text_blocks: list[int]) -> dict[int, int]:
    """Return by visual block the number of the text block whose middle layer it shares.

    This is for encoders whose blocks do not count alike (ResNets). The visual blocks are laid along the last text
    blocks in order, the last beside the last. If there are more visual than text blocks, the first visual ones are all
    laid beside the first text block.
    """
    first, last, n = min(text_blocks), max(text_blocks), len(visual_blocks)
    return {block: max(first, last - (n - k)) for k, block in enumerate(sorted(visual_blocks), start=1)}


def _linear(n_in: int, n_out: int) -> nn.Linear:
    """Return a linear layer with Kaiming-normal weight (fan_out, relu) and zero bias."""
    layer = nn.Linear(n_in, n_out)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


class _ScaledGradient(torch.autograd.Function):
    """The identity, but in the backward pass the gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class Bottleneck(nn.Module):
    """One encoder's own half of the adapter of one block: down, up and the scale, learnt or fixed.

    Raises:
        ValueError: gradient scaling with a scale of 0.
    """

    def __init__(
        self, width: int, dim: int, scale: float, learn_scale: bool = True, grad_scaling: bool = False
    ) -> None:
        super().__init__()
        if grad_scaling and scale == 0:
            raise ValueError("Expected gradient scaling to come with an adapter scale other than 0 but got 0")
        # The factor is the initial scale, not the learnt one: then what lies before always gets its true gradient.
        self.grad_factor = float(scale) if grad_scaling else None
        self.down = _linear(width, dim)
        self.up = _linear(dim, width)
        self.scale = nn.Parameter(torch.tensor(float(scale)), requires_grad=learn_scale)

    def forward(self, x: Tensor, shared: nn.Module) -> Tensor:
        """Return the adapter's output [..., D] for x [..., D], in fp32 whatever the backbone's precision."""
        with torch.autocast(device_type=x.device.type, enabled=False):  # fp32 master weights compute in fp32
            x = x.float()
            # Without gradients there is nothing to scale; an exported graph cannot hold an autograd.Function.
            factor = self.grad_factor if torch.is_grad_enabled() else None
            if factor is not None:
                x = _ScaledGradient.apply(x, factor)
            y = F.relu(self.down(x))
            y = F.relu(shared(y))
            # This is scale * up(y). The scale multiplies r numbers per token and not D, so that its gradient needs
            # y [..., r] only.
            y = F.linear(self.scale * y, self.up.weight, self.scale * self.up.bias)
            return y if factor is None else _ScaledGradient.apply(y, 1.0 / factor)


class AdapterEdit(BlockEdit):
    """Add beside each adapted block of one encoder the output of the block's adapter.

    The adapter of a transformer block works on the tokens, that of a ResNet's block over the channels of its map.

    Args:
        own: the Bottleneck of each adapted block, by its number.
        shared: the middle layers.
        share: for each adapted block, the number of its middle layer.
    """

    def __init__(self, own: nn.ModuleDict, shared: nn.ModuleDict, share: Mapping[int, int]) -> None:
        self.own, self.middle, self.share = own, shared, share
        self.first_block = min(share)

    def parallel(self, number: int, x: Tensor) -> Tensor | None:
        """Return what is added to a block's output, fp32; None: the block is not adapted. See BlockEdit."""
        if number not in self.share:
            return None
        adapter, middle = self.own[str(number)], self.middle[str(self.share[number])]
        return adapter(x, middle) if x.ndim != 4 else adapter(x.movedim(1, -1), middle).movedim(-1, 1)


class CrossModalAdapter(nn.Module):
    """The adapters of all adapted blocks of both encoders.

    Args:
        visual: width D of each adapted visual block, by block number (from 1).
        text: width D of each adapted text block, by block number (from 1).
        dim: bottleneck width r.
        scale: initial value of every learnable scale; at 0 the encoders are exactly CLIP's.
        share: for a visual block, the number of the shared middle layer it uses; by default its own number. Text
            blocks always use the layer of their own number.
        learn_scale: whether the scales are learnt (DLR-CLIP) or stay what they are (MMA).
        grad_scaling: see the head of this file; the factor is `scale`, also where scales are learnt.

    Raises:
        ValueError: no block to adapt in an encoder, a bottleneck width below 1, or gradient scaling with scale 0.
    """

    def __init__(
        self,
        visual: Mapping[int, int],
        text: Mapping[int, int],
        *,
        dim: int = 32,
        scale: float = 0.01,
        share: Mapping[int, int] | None = None,
        learn_scale: bool = True,
        grad_scaling: bool = False,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"Expected the adapter's bottleneck width to be at least 1 but got {dim}")
        if not visual or not text:
            raise ValueError(
                "Expected at least one block to adapt in each encoder but got "
                f"visual blocks {sorted(visual)} and text blocks {sorted(text)}"
            )
        self.share = {block: (share or {}).get(block, block) for block in visual}
        self.shared = nn.ModuleDict({str(i): _linear(dim, dim) for i in sorted({*self.share.values(), *text})})
        own = (dim, scale, learn_scale, grad_scaling)
        self.visual = nn.ModuleDict({str(i): Bottleneck(visual[i], *own) for i in sorted(visual)})
        self.text = nn.ModuleDict({str(i): Bottleneck(text[i], *own) for i in sorted(text)})

    @property
    def visual_edit(self) -> AdapterEdit:
        """The adapters as an edit of the image tower."""
        return AdapterEdit(self.visual, self.shared, self.share)

    @property
    def text_edit(self) -> AdapterEdit:
        """The adapters as an edit of the text tower."""
        return AdapterEdit(self.text, self.shared, {int(i): int(i) for i in self.text})

    def scales(self) -> dict[str, Tensor]:
        """Return the adapters' scales by encoder and block, e.g. {"visual/5": tensor(0.01), ...}, detached."""
        return {
            name.removesuffix(".scale").replace(".", "/"): value.detach()
            for name, value in self.named_parameters()  # visual.5.scale, ...
            if name.endswith(".scale")
        }


def build_adapter(
    clip: CLIP,
    start: int,
    end: int,
    dim: int,
    scale: float,
    learn_scale: bool = True,
    grad_scaling: bool = False,
) -> CrossModalAdapter:
    """Return the cross-modal adapter for blocks `start` to `end` of both encoders, `end` clipped to each one's depth.

    A ResNet's residual blocks do not count like transformer blocks: there, all blocks of the last two stages are
    adapted and their middle layers are tied to the last text blocks in order; `start` and `end` act on the text.

    Raises:
        ValueError: `start` lies beyond an encoder's last block.
    """
    depth = min(clip.text.depth, clip.visual.depth) if clip.visual.kind == "vit" else clip.text.depth
    if start > depth:
        raise ValueError(
            f"Expected the first adapted block (START) to be at most {depth}, the depth of {clip.name}, but got {start}"
        )
    kinds: dict[str, Any] = {"dim": dim, "scale": scale, "learn_scale": learn_scale, "grad_scaling": grad_scaling}
    text = {i: clip.text.widths[i] for i in range(start, min(end, clip.text.depth) + 1)}
    if clip.visual.kind == "vit":
        visual = {i: clip.visual.widths[i] for i in range(start, min(end, clip.visual.depth) + 1)}
        return CrossModalAdapter(visual, text, **kinds)
    blocks = list(clip.visual.adaptable)
    visual = {i: clip.visual.widths[i] for i in blocks}
    share = share_in_order(blocks, list(text))
    return CrossModalAdapter(visual, text, share=share, **kinds)

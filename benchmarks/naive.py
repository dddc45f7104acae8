"""DLR-CLIP's training step and evaluation as published: the oracle and the yardstick of the accelerated trainer.

Written from the method's formulas over the parameters of a `DLRCLIPNetwork`, and calling none of its code:
* the image encoder runs from the first block to the last for the zero-shot branch, again for the adapted branch, and
  in training a third time for the teacher of the distillation;
* every class's prompt goes through the whole text encoder at the full context length (77 tokens), in every step and
  for every test batch;
* every block computes every token.
The zero-shot classifier is encoded once per run, here too. Attention is the fused kernel, as in the accelerated path:
what the two differ in is what they compute, not how well.

Legend: B images, C classes, N tokens, L = 77, D width, E joint embedding.
"""

from __future__ import annotations

import math
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm in its weights' precision."""
    return F.layer_norm(x.to(layer.weight.dtype), layer.normalized_shape, layer.weight, layer.bias, layer.eps).to(x)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]


def _block(block: Any, x: Tensor, mask: Tensor | None, adapter: Any, shared: Any) -> Tensor:
    """Run a block on x [B, N, D].

    It gives x' + mlp(ln_2(x')) + scale * up(relu(shared(relu(down(ln_1(x)))))), with x' = x + attn(ln_1(x)).
    """
    normed = _norm(block.ln_1, x)
    attn = block.attn
    q, k, v = F.linear(normed, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (y.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    out = x + _linear(attn.out_proj, mixed)
    out = out + block.mlp(_norm(block.ln_2, out))
    if adapter is None:
        return out
    y = F.relu(_linear(shared, F.relu(_linear(adapter.down, normed.float()))))
    return out + (adapter.scale * _linear(adapter.up, y)).to(out)


class Naive:
    """A DLR-CLIP network (ViT; CMA, GLR and SKD on, gates learnt) computed as published.

    Args:
        network: whose CLIP, adapters, heads and constants are used.
        passes: image passes of a training step: 3, or 2 where the teacher's logits are taken from the first.
    """

    def __init__(self, network: Any, passes: int = 3) -> None:
        if passes not in (2, 3):
            raise ValueError(f"Expected 2 or 3 image passes but got {passes}")
        clip = network.clip
        self.network, self.learner, self.clip, self.passes = network, network.learner, clip, passes
        self.visual, self.text = clip.visual.visual, clip.text
        prompts = [f"{network.context} {name.replace('_', ' ')}." for name in network.classnames]
        self.ids = open_clip.tokenize(prompts, context_length=clip.text.context_length).to(clip.device)  # [C, L]
        length = self.ids.shape[1]
        self.mask = torch.full((length, length), -math.inf, device=clip.device, dtype=clip.dtype).triu(1)

    # Encoders

    def image_features(self, images: Tensor, adapted: bool) -> Tensor:
        """[B, 3, H, W] -> normalized fp32 [B, E]."""
        visual, cma = self.visual, self.learner.cma
        x = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)  # [B, N - 1, D]
        x = torch.cat([visual.class_embedding.to(x).expand(len(x), 1, -1), x], dim=1)
        x = _norm(visual.ln_pre, x + visual.positional_embedding.to(x))
        for i, block in enumerate(visual.transformer.resblocks, start=1):
            use = adapted and str(i) in cma.visual
            x = _block(block, x, None, cma.visual[str(i)] if use else None, cma.shared[str(i)] if use else None)
        return F.normalize((_norm(visual.ln_post, x)[:, 0] @ visual.proj).float(), dim=-1)

    def text_features(self, ids: Tensor) -> Tensor:
        """Adapted text encoder: token ids [C, L] -> normalized fp32 [C, E]."""
        text, cma = self.text, self.learner.cma
        dtype = text.text_projection.dtype
        x = text.token_embedding(ids).to(dtype) + text.positional_embedding.to(dtype)
        for i, block in enumerate(text.transformer.resblocks, start=1):
            use = str(i) in cma.text
            x = _block(block, x, self.mask, cma.text[str(i)] if use else None, cma.shared[str(i)] if use else None)
        last = _norm(text.ln_final, x)[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]
        return F.normalize((last @ text.text_projection).float(), dim=-1)

    def _zero_shot(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.clip.logit_scale * self.image_features(images, False) @ self.network.zeroshot.t()

    # Heads

    def _refine(self, clip_logits: Tensor, cma_logits: Tensor) -> Tensor:
        glr = self.learner.glr

        def recalibrate(part: Any, z: Tensor) -> Tensor:
            return z * torch.sigmoid(_linear(part.excite, F.relu(_linear(part.squeeze, z))))

        f_clip = recalibrate(glr.recalibrate_clip, F.gelu(_linear(glr.project_clip, clip_logits)))
        f_cma = recalibrate(glr.recalibrate_cma, F.gelu(_linear(glr.project_cma, cma_logits)))
        alpha = torch.sigmoid(_linear(glr.gate[2], F.relu(_linear(glr.gate[0], f_clip))))
        return clip_logits + glr.res_scale * _linear(glr.head, _norm(glr.norm, f_clip + alpha * f_cma))

    def heads(self, clip_logits: Tensor, cma_logits: Tensor) -> dict[str, Tensor]:
        """clip, cma, glr, final and fused logits, each [B, C]."""
        glr_logits = self._refine(clip_logits, cma_logits)
        gate = self.learner.fusion.layers
        w = torch.sigmoid(_linear(gate[2], F.relu(_linear(gate[0], cma_logits))))
        beta = self.learner.coefficient()
        return {
            "clip": clip_logits,
            "cma": cma_logits,
            "glr": glr_logits,
            "final": w * cma_logits + (1 - w) * glr_logits,
            "fused": beta * cma_logits + (1 - beta) * glr_logits,
        }

    # A training step

    def loss(self, images: Tensor, labels: Tensor, text_features: Tensor | None = None) -> Tensor:
        """The sum of the losses with distillation, weights as configured; text features are encoded unless given."""
        clip_logits = self._zero_shot(images)
        teacher = self._zero_shot(images) if self.passes == 3 else clip_logits
        features = self.text_features(self.ids) if text_features is None else text_features
        heads = self.heads(clip_logits, self.clip.logit_scale * self.image_features(images, True) @ features.t())
        weights, temperature, a = self.network.loss_weights, self.network.temperature, self.network.smoothing
        p = (1 - a) * F.softmax(teacher / temperature, dim=1) + a / teacher.shape[1]
        log_q = F.log_softmax(heads["final"] / temperature, dim=1)
        return (
            weights["ce_glr"] * F.cross_entropy(heads["glr"], labels)
            + weights["ce_final"] * F.cross_entropy(heads["final"], labels)
            + weights["l1_glr"] * (heads["glr"] - clip_logits).abs().mean()
            + weights["kd"] * temperature**2 * (p * (p.log() - log_q)).sum(dim=1).mean()
        )

    # Evaluation

    @torch.no_grad()
    def evaluate(self, images: Tensor) -> dict[str, Tensor]:
        """A test batch [B, 3, H, W] -> the five heads, every prompt encoded anew."""
        features = self.text_features(self.ids)
        return self.heads(
            self._zero_shot(images), self.clip.logit_scale * self.image_features(images, True) @ features.t()
        )

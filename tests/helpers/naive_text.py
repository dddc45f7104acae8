"""CLIP's text encoder as published: all 77 tokens, all blocks, through open_clip's own modules."""

import torch
from torch import Tensor
from torch.nn import functional as F


def encode_embedded(model, embedded: Tensor, ids: Tensor) -> Tensor:
    """Token embeddings [C, 77, D] of prompts with token ids [C, 77] -> normalized features [C, E]."""
    x = model.transformer(embedded + model.positional_embedding, attn_mask=model.attn_mask)
    x = model.ln_final(x)[torch.arange(len(ids)), ids.argmax(dim=-1)] @ model.text_projection
    return F.normalize(x, dim=-1)

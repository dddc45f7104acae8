"""CLIP's text encoder as published: all 77 tokens, all blocks, through open_clip's own modules."""

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F


def encode_embedded(model, embedded: Tensor, ids: Tensor) -> Tensor:
    """Token embeddings [C, 77, D] of prompts with token ids [C, 77] -> normalized features [C, E]."""
    x = model.transformer(embedded + model.positional_embedding, attn_mask=model.attn_mask)
    x = model.ln_final(x)[torch.arange(len(ids)), ids.argmax(dim=-1)] @ model.text_projection
    return F.normalize(x, dim=-1)


def encode_prompts(model, context: Tensor, names, words: str = "", rest: str = "{}.", inner=None) -> Tensor:
    """Features [C, E], normalized, of prompts with these vectors [n, D]: all 77 tokens, no sharing.

    inner: (number of a block, from 1, tokens [C, n, D] that replace the vectors before it).
    """
    n = len(context)
    ids = open_clip.tokenize([f"{words or ' '.join('X' * n)} {rest.format(name.replace('_', ' '))}" for name in names])
    embedded = model.token_embedding(ids)
    x = torch.cat([embedded[:, :1], context.expand(len(names), -1, -1), embedded[:, 1 + n :]], dim=1)
    if inner is None:
        return encode_embedded(model, x, ids)
    x = x + model.positional_embedding
    for number, block in enumerate(model.transformer.resblocks, start=1):
        if number == inner[0]:
            x = torch.cat([x[:, :1], inner[1], x[:, 1 + n :]], dim=1)
        x = block(x, attn_mask=model.attn_mask)
    x = model.ln_final(x)[torch.arange(len(ids)), ids.argmax(dim=-1)] @ model.text_projection
    return F.normalize(x, dim=-1)

"""CLIP's encoders with tokens in front of blocks, through open_clip's own modules: all tokens of all blocks."""

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F


def causal(length):
    return torch.full((length, length), float("-inf")).triu_(1)


def with_inserted(x: Tensor, tokens: Tensor, share: float | None) -> Tensor:
    """Sequences [B, L, D] with tokens [n, D] behind the first one of each.

    share: None: they are inserted; else they replace n tokens that are there, of which 1 - share stays.
    """
    new = tokens.expand(len(x), -1, -1)
    if share is None:
        return torch.cat([x[:, :1], new, x[:, 1:]], dim=1)
    old = x[:, 1 : 1 + len(tokens)]
    return torch.cat([x[:, :1], share * new + (1 - share) * old, x[:, 1 + len(tokens) :]], dim=1)


def encode_texts(model, prompts, first=None, deeper=None, inserted=None, share=1.0) -> Tensor:
    """Features [C, E], not normalized, of prompts at full length.

    first: [n, D], embeddings of the tokens behind the start of text.
    deeper: block -> [n, D], what replaces these before a block.
    inserted: block -> [n, D], what is inserted there before the first of these blocks, and then replaces itself.
    """
    ids = open_clip.tokenize(prompts)
    x = model.token_embedding(ids)
    if first is not None:
        x = torch.cat([x[:, :1], first.expand(len(x), -1, -1), x[:, 1 + len(first) :]], dim=1)
    x, eot, here = x + model.positional_embedding, ids.argmax(dim=-1), False
    for number, block in enumerate(model.transformer.resblocks, start=1):
        if deeper and number in deeper:
            new = deeper[number]
            x = torch.cat([x[:, :1], new.expand(len(x), -1, -1), x[:, 1 + len(new) :]], dim=1)
        if inserted and number in inserted:
            x = with_inserted(x, inserted[number], share if here else None)
            eot, here = eot if here else eot + len(inserted[number]), True
        x = block(x, attn_mask=causal(x.shape[1]))
    return model.ln_final(x)[torch.arange(len(ids)), eot] @ model.text_projection


def encode_images(model, images, behind=None, inserted=None, share=1.0) -> Tensor:
    """Tokens [B, N, D] that leave the last block, through ln_post; the first is the class token.

    behind: block -> [n, D], what stands behind the patches; block 1's before ln_pre. inserted: as above.
    """
    visual = model.visual
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(images), 1, -1), patches], dim=1) + visual.positional_embedding
    if behind:
        x = torch.cat([x, behind[1].expand(len(x), -1, -1)], dim=1)
    x, here = visual.ln_pre(x), False
    for number, block in enumerate(visual.transformer.resblocks, start=1):
        if behind and number > 1 and number in behind:
            new = behind[number]
            x = torch.cat([x[:, : -len(new)], new.expand(len(x), -1, -1)], dim=1)
        if inserted and number in inserted:
            x, here = with_inserted(x, inserted[number], share if here else None), True
        x = block(x)
    return visual.ln_post(x)


def image_features(model, images, behind=None) -> Tensor:
    """Features [B, E], not normalized."""
    return encode_images(model, images, behind)[:, 0] @ model.visual.proj


def logits(model, images, texts) -> Tensor:
    """Logits [B, C] of features that are not normalized."""
    return model.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).t()


def published(learner, clips=("image_encoder.conv1.weight", "text_encoder.ln_final.weight", "logit_scale")):
    """A whole model's state as published code saves it, half precision: (state, what is learnt)."""
    learnt = {name: torch.randn(p.shape).half() for name, p in learner.named_parameters()}
    tokens = {
        "prompt_learner.token_prefix": torch.randn(40, 1, 32),
        "prompt_learner.token_suffix": torch.randn(40, 74, 32),
    }
    return {**learnt, **tokens, **{name: torch.randn(3) for name in clips}}, learnt

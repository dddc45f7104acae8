"""Pretrain the bundled tiny CLIP on rendered picture-caption pairs.

    python scripts/pretrain_tiny_clip.py --minutes 75 --seed 1

Beyond plain contrastive training, and on purpose, since small batches on a CPU do not get off the ground otherwise:
* a caption counts as a positive for every picture of the batch of which it is true, not only for its own;
* linear heads on the image embedding learn the object, colour and texture (thrown away afterwards);
* a linear head on a middle block's patches learns the foreground mask (thrown away afterwards);
* Muon for the block matrices, AdamW for the rest; sin-cos initial position embedding; a scheduled logit scale.

Writes trainers/clip/assets/tiny_clip.{safetensors,json}, with the recipe and the zero-shot accuracy measured on images
that no test set holds.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from open_clip import tokenize
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dassl.config import get_cfg_default
from datasets import extend_cfg
from datasets.digits import Digits
from datasets.rendering import TEXTURES
from datasets.shapes import Shapes
from scripts.tiny_world import COLOUR_NAMES, OBJECTS, Pool, caption_batch, render_pool, true_pairs
from trainers.clip import templates_for

logger = logging.getLogger("pretrain")
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1) * 255
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1) * 255
ARCH = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {"layers": 6, "width": 128, "head_width": 32, "patch_size": 8, "image_size": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 6},
}
MASK_BLOCK = 3  # the block after which the foreground head reads the patches


class Vocabulary:
    """The BPE ids that captions use, renumbered from 0 in their order: no dead rows, and EOT stays the largest."""

    def __init__(self, texts: list[str]) -> None:
        self.ids = torch.unique(tokenize(texts))
        self.rows = torch.full((49408,), -1, dtype=torch.long)
        self.rows[self.ids] = torch.arange(len(self.ids))

    def __call__(self, texts: list[str]) -> Tensor:
        """Renumbered ids [N, L], cut to the longest text."""
        tokens = tokenize(texts)
        tokens = tokens[:, : int((tokens != 0).sum(dim=1).max())]
        return self.rows[tokens]


def sincos_position(grid: int, width: int) -> Tensor:
    """2-D sin-cos embedding [1 + grid^2, width]; the class token's row is zero."""
    quarter = width // 4
    omega = 1.0 / 100 ** (torch.arange(quarter) / quarter)
    y, x = torch.meshgrid(torch.arange(grid).float(), torch.arange(grid).float(), indexing="ij")
    parts = [f(v.reshape(-1, 1) * omega) for v in (x, y) for f in (torch.sin, torch.cos)]
    return torch.cat([torch.zeros(1, width), torch.cat(parts, dim=1)])


def run_block(block: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """One transformer block of open_clip on [B, L, D].

    Plain attention: for short rows in bfloat16 on a CPU it took a fifth of the fused one's time.
    """
    batch, length, width = x.shape
    heads = block.attn.num_heads
    h = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    q, k, v = h.view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weight = q * (width // heads) ** -0.5 @ k.transpose(-1, -2)
    weight = (weight if mask is None else weight + mask.to(weight.dtype)).softmax(dim=-1).to(v.dtype)
    x = x + block.attn.out_proj((weight @ v).transpose(1, 2).reshape(batch, length, width))
    return x + block.mlp(block.ln_2(x))


class Pretrainer(nn.Module):
    """The CLIP and the heads that only pretraining needs; run block by block to read a middle block."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        text = CLIPTextCfg(**{**ARCH["text_cfg"], "vocab_size": rows})
        self.clip = CLIP(ARCH["embed_dim"], CLIPVisionCfg(**ARCH["vision_cfg"]), text, quick_gelu=True)
        width, embed = ARCH["vision_cfg"]["width"], ARCH["embed_dim"]
        grid = ARCH["vision_cfg"]["image_size"] // ARCH["vision_cfg"]["patch_size"]
        with torch.no_grad():
            self.clip.visual.positional_embedding.copy_(0.3 * sincos_position(grid, width))
        self.heads = nn.ModuleDict(
            {
                k: nn.Linear(embed, n)
                for k, n in (("object", len(OBJECTS)), ("colour", len(COLOUR_NAMES)), ("texture", len(TEXTURES)))
            }
        )
        self.mask = nn.Linear(width, 1)

    def image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised embeddings [B, E] and foreground logits [B, patches]."""
        v = self.clip.visual
        x = v.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + v.positional_embedding.to(
            x.dtype
        )
        x = v.ln_pre(x)
        for i, block in enumerate(v.transformer.resblocks, start=1):
            x = run_block(block, x)
            if i == MASK_BLOCK:
                foreground = self.mask(x[:, 1:]).squeeze(-1)
        return F.normalize((v.ln_post(x[:, 0]) @ v.proj).float(), dim=-1), foreground.float()

    def text(self, tokens: Tensor) -> Tensor:
        """Normalised embeddings [N, E]."""
        c, length = self.clip, tokens.shape[1]
        x = c.token_embedding(tokens) + c.positional_embedding[:length]
        for block in c.transformer.resblocks:
            x = run_block(block, x, c.attn_mask[:length, :length])
        x = c.ln_final(x[torch.arange(len(x)), tokens.argmax(dim=1)])  # causal: only EOT is read
        return F.normalize((x @ c.text_projection).float(), dim=-1)


def contrastive(f: Tensor, g: Tensor, scale: float, positive: Tensor) -> Tensor:
    """Symmetric cross-entropy of embeddings [B, E], the target spread evenly over the true pairs [B, B]."""
    logits, p = scale * f @ g.T, positive.float()
    rows = -(F.log_softmax(logits, dim=1) * p / p.sum(dim=1, keepdim=True)).sum(dim=1)
    columns = -(F.log_softmax(logits, dim=0) * p / p.sum(dim=0, keepdim=True)).sum(dim=0)
    return (rows.mean() + columns.mean()) / 2


def normalised(images: np.ndarray) -> Tensor:
    """uint8 [B, S, S, 3] -> float [B, 3, S, S] with CLIP's mean and deviation."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - MEAN) / STD


def augmented(images: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Normalised float batch [B, 3, S, S] with a random crop by up to 4 pixels and a channel gain."""
    x = normalised(images)
    dx, dy = (int(v) for v in rng.integers(0, 9, 2))
    size = x.shape[-1]
    x = F.pad(x, (4, 4, 4, 4), mode="replicate")[:, :, dy : dy + size, dx : dx + size]
    if rng.random() < 0.15:
        x = x.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return x


class Probe:
    """What accuracy is watched on: the training images of `Digits` and `Shapes`; never their test images."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        cfg = get_cfg_default()
        extend_cfg(cfg)
        self.sets = {}
        for reader, name in ((Digits, "Digits"), (Shapes, "Shapes")):
            dataset = reader(cfg)
            images = np.stack([np.asarray(Image.open(item.impath).convert("RGB")) for item in dataset.train_x])
            labels = torch.tensor([item.label for item in dataset.train_x])
            (template,) = templates_for(name)
            prompts = vocabulary([template.format(c) for c in dataset.classnames])
            self.sets[name.lower()] = (normalised(images), labels, prompts)

    @torch.no_grad()
    def __call__(self, model: Pretrainer) -> dict[str, float]:
        """Zero-shot accuracy in percent, and that of a linear probe on 16 shots a class (the rest is its test)."""
        from sklearn.linear_model import LogisticRegression

        result = {}
        for name, (images, labels, prompts) in self.sets.items():
            f = torch.cat([model.image(chunk)[0] for chunk in images.split(256)])
            hit = (f @ model.text(prompts).T).argmax(dim=1) == labels
            shots = torch.cat([torch.nonzero(labels == c)[:16, 0] for c in labels.unique()])
            rest = torch.ones(len(labels), dtype=torch.bool)
            rest[shots] = False
            probe = LogisticRegression(C=100.0, max_iter=300).fit(f[shots].numpy(), labels[shots].numpy())
            result[name] = round(100 * hit.float().mean().item(), 1)
            result[f"{name}_probe16"] = round(100 * probe.score(f[rest].numpy(), labels[rest].numpy()), 1)
        return result


def optimisers(model: Pretrainer, lr: float) -> list[torch.optim.Optimizer]:
    blocks = [*model.clip.visual.transformer.parameters(), *model.clip.transformer.parameters()]
    matrices = [p for p in blocks if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for n, p in model.named_parameters() if id(p) not in chosen and n != "clip.logit_scale"]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(rest, lr=lr / 6, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def save(model: Pretrainer, vocabulary: Vocabulary, record: dict, folder: Path) -> None:
    """Write the checkpoint with the used rows of the token embedding."""
    from trainers.clip.tiny import save_tiny

    full = CLIP(
        ARCH["embed_dim"], CLIPVisionCfg(**ARCH["vision_cfg"]), CLIPTextCfg(**ARCH["text_cfg"]), quick_gelu=True
    )
    state = dict(model.clip.state_dict())
    rows = state.pop("token_embedding.weight")
    embedding = torch.zeros(49408, rows.shape[1])
    embedding[vocabulary.ids] = rows
    full.load_state_dict({**state, "token_embedding.weight": embedding})
    save_tiny(full, vocabulary.ids.tolist(), record, folder)


def all_texts() -> list[str]:
    """Every word that captions may use, plus the usual prompt words, so that their rows exist."""
    from scripts.tiny_world import ANY, DIGIT, SHAPE

    words = [*OBJECTS, *COLOUR_NAMES, *TEXTURES, *"0123456789"]
    return [
        *words,
        *(t.format(o="a", c="b", b="c", t="d") for t in (*ANY, *SHAPE, *DIGIT)),
        "itap of a bad photo of the origami large in a video game art small, a type of texture pattern.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=75, help="training time; the schedule is made for it")
    parser.add_argument(
        "--steps",
        type=int,
        default=0,
        help="number of steps instead of minutes: reproducible to the bit on one machine",
    )
    parser.add_argument(
        "--pool",
        type=int,
        default=120_000,
        help="pictures rendered; every one is seen several times, with fresh captions",
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.012, help="Muon's; AdamW gets a sixth")
    parser.add_argument("--mixup", type=float, default=0.4, help="how often the annotator uses a neighbour's name")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=float, default=3, help="minutes between measurements and checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).resolve().parents[1] / "trainers" / "clip" / "assets"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(args.seed)
    start = time.time()
    pool = render_pool(args.pool, args.seed)
    logger.info("rendered %d pictures in %.0f s", len(pool), time.time() - start)
    vocabulary = Vocabulary(all_texts())
    model, probe = Pretrainer(len(vocabulary.ids)), Probe(vocabulary)
    model.image = torch.compile(model.image)  # fuses the element-wise parts: twice as fast
    train(args, model, pool, vocabulary, probe, rng)


def train(
    args: argparse.Namespace,
    model: Pretrainer,
    pool: Pool,
    vocabulary: Vocabulary,
    probe: Probe,
    rng: np.random.Generator,
) -> None:
    opts = optimisers(model, args.lr)
    base = [[g["lr"] for g in o.param_groups] for o in opts]
    start, step, share, shown = time.time(), 0, 0.0, time.time()
    order = rng.permutation(len(pool))
    position = 0
    while share < 1:
        share = step / args.steps if args.steps else (time.time() - start) / (60 * args.minutes)
        factor = min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        for optimiser, rates in zip(opts, base, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        if position + args.batch > len(order):
            order, position = rng.permutation(len(pool)), 0
        index = order[position : position + args.batch]
        position += args.batch
        captions, seen = caption_batch(pool, index, rng, args.mixup)
        scale = 12 + 38 * min(1.0, share / 0.8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            f, foreground = model.image(augmented(pool.images[index], rng))
            g = model.text(vocabulary(captions.text))
        loss = contrastive(f, g, scale, torch.from_numpy(true_pairs(captions.mentioned, seen)))
        for name, head in model.heads.items():
            loss = loss + 0.3 * F.cross_entropy(head(f * 8), torch.from_numpy(getattr(pool, name)[index]))
        target = torch.from_numpy(pool.foreground[index]).flatten(1).float() / 255
        loss = loss + 0.5 * F.binary_cross_entropy_with_logits(foreground, target)
        for optimiser in opts:
            optimiser.zero_grad()
        loss.backward()
        for optimiser in opts:
            optimiser.step()
        step += 1
        if time.time() - shown > 60 * args.report or share >= 1:
            shown = time.time()
            with torch.no_grad():
                model.clip.logit_scale.fill_(math.log(scale))
            model.eval()
            accuracy = probe(model)
            model.train()
            logger.info("step %d (%.0f %%) loss %.3f scale %.0f %s", step, 100 * share, loss.item(), scale, accuracy)
            record = {
                "command": "python " + " ".join(["scripts/pretrain_tiny_clip.py", *sys.argv[1:]]),
                "seed": args.seed,
                "steps": step,
                "pairs": step * args.batch,
                "minutes": round((time.time() - start) / 60, 1),
                "logit_scale": scale,
                "watched_accuracy": accuracy,
                "torch": torch.__version__,
            }
            save(model, vocabulary, record, args.output)
            (args.output / "tiny_clip_log.jsonl").open("a").write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()

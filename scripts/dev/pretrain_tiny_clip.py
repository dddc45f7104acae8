"""Pretrain the bundled tiny CLIP on rendered picture-caption pairs.

    python scripts/dev/pretrain_tiny_clip.py --compile
    python scripts/dev/pretrain_tiny_clip.py --stage text --steps 300 --lr 0.01 --warmup 10 --mixup 0.5

Beyond plain contrastive training, and on purpose, since small batches on a CPU do not get off the ground otherwise:
* a caption counts as a positive for every picture of the batch of which it is true, not only for its own;
* linear heads on the image embedding learn the object, color and texture (thrown away afterwards);
* a linear head on a middle block's patches learns the foreground mask (thrown away afterwards);
* a second stage tunes the text encoder alone on captions of an annotator who cannot tell some pairs apart: zero-shot
  accuracy becomes weak where the image features are not, which leaves adaptation something to do;
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import tokenize
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import ResidualAttentionBlock
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

if __name__ == "__main__":  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dassl.config import get_cfg_default
from dassl.utils.cli import run_main
from datasets import extend_cfg
from datasets.digits import Digits
from datasets.rendering import TEXTURES
from datasets.shapes import Shapes
from scripts.dev.tiny_world import (
    ANY,
    COLOR_NAMES,
    DIGIT,
    MIXED_UP,
    OBJECTS,
    SHAPE,
    SWAPPED,
    Pool,
    caption_batch,
    render_pool,
    true_pairs,
)
from trainers.api.folds import first_of_each
from trainers.clip import templates_for
from trainers.clip.tiny import save_tiny

logger = logging.getLogger("pretrain")
ROOT = Path(__file__).resolve().parents[2]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1) * 255
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1) * 255
ARCH: dict[str, Any] = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {"layers": 6, "width": 128, "head_width": 32, "patch_size": 8, "image_size": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 6},
}
FIRST_SCALE, LAST_SCALE = 12.0, 50.0  # the logit scale rises linearly and stays for the last fifth
MASK_BLOCK = 3  # the block after which the foreground head reads the patches


class Vocabulary:
    """The BPE ids that captions use, renumbered from 0 in their order: no dead rows, and EOT stays the largest."""

    def __init__(self, texts: list[str]) -> None:
        self.ids = torch.unique(tokenize(texts))
        self.rows = torch.full((49408,), -1, dtype=torch.long)
        self.rows[self.ids] = torch.arange(len(self.ids))

    def __call__(self, texts: list[str]) -> Tensor:
        """Return renumbered ids [N, L], cut to the longest text."""
        tokens = tokenize(texts)
        tokens = tokens[:, : int((tokens != 0).sum(dim=1).max())]
        return self.rows[tokens]


def sincos_position(grid: int, width: int) -> Tensor:
    """Return the 2-D sin-cos embedding [1 + grid^2, width]; the class token's row is zero."""
    quarter = width // 4
    omega = 1.0 / 100 ** (torch.arange(quarter) / quarter)
    y, x = torch.meshgrid(torch.arange(grid).float(), torch.arange(grid).float(), indexing="ij")
    parts = [f(v.reshape(-1, 1) * omega) for v in (x, y) for f in (torch.sin, torch.cos)]
    return torch.cat([torch.zeros(1, width), torch.cat(parts, dim=1)])


def run_block(block: ResidualAttentionBlock, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Run one transformer block of open_clip on [B, L, D].

    Attention is plain: for short rows in bfloat16 on a CPU it took a fifth of the time of fused attention.
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
    """The CLIP and the heads that only pretraining needs; it runs block by block, to read a middle block."""

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
                for k, n in (("object", len(OBJECTS)), ("color", len(COLOR_NAMES)), ("texture", len(TEXTURES)))
            }
        )
        self.mask = nn.Linear(width, 1)

    def image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalized embeddings [B, E] and foreground logits [B, patches]."""
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
        """Return normalized embeddings [N, E]."""
        c, length = self.clip, tokens.shape[1]
        x = c.token_embedding(tokens) + c.positional_embedding[:length]
        for block in c.transformer.resblocks:
            x = run_block(block, x, c.attn_mask[:length, :length])
        x = c.ln_final(x[torch.arange(len(x)), tokens.argmax(dim=1)])  # causal: only EOT is read
        return F.normalize((x @ c.text_projection).float(), dim=-1)


def contrastive(f: Tensor, g: Tensor, scale: float, positive: Tensor) -> Tensor:
    """Return the symmetric cross-entropy of embeddings [B, E], its target spread evenly over the true pairs [B, B]."""
    logits, p = scale * f @ g.T, positive.float()
    rows = -(F.log_softmax(logits, dim=1) * p / p.sum(dim=1, keepdim=True)).sum(dim=1)
    columns = -(F.log_softmax(logits, dim=0) * p / p.sum(dim=0, keepdim=True)).sum(dim=0)
    return (rows.mean() + columns.mean()) / 2


def normalized(images: np.ndarray) -> Tensor:
    """Normalize uint8 [B, S, S, 3] to float [B, 3, S, S] with CLIP's mean and deviation."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - MEAN) / STD


def augmented(images: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Return a normalized float batch [B, 3, S, S], cropped at random by up to 4 pixels and now and then made gray."""
    x = normalized(images)
    dx, dy = (int(v) for v in rng.integers(0, 9, 2))
    size = x.shape[-1]
    x = F.pad(x, (4, 4, 4, 4), mode="replicate")[:, :, dy : dy + size, dx : dx + size]
    if rng.random() < 0.15:
        x = x.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    return x


class Probe:
    """The images that accuracy is watched on: the training images of `Digits` and `Shapes`, never test images.

    Args:
        vocabulary: of the prompts.
        most: images of each class; 0: all.
    """

    def __init__(self, vocabulary: Vocabulary, most: int = 0) -> None:
        cfg = get_cfg_default()
        extend_cfg(cfg)
        self.sets = {}
        for reader, name in ((Digits, "Digits"), (Shapes, "Shapes")):
            dataset = reader(cfg)
            items = first_of_each(dataset.train_x, most) if most else dataset.train_x
            images = np.stack([np.asarray(Image.open(item.impath).convert("RGB")) for item in items])
            labels = torch.tensor([item.label for item in items])
            (template,) = templates_for(name)
            prompts = vocabulary([template.format(c) for c in dataset.classnames])
            self.sets[name.lower()] = (normalized(images), labels, prompts)

    @torch.no_grad()
    def __call__(self, model: Pretrainer) -> dict[str, float]:
        """Return accuracy (percent) of zero-shot, and of a linear probe on 16 shots a class (the rest is its test)."""
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


def optimizers(model: Pretrainer, lr: float, text_only: bool = False) -> list[torch.optim.Optimizer]:
    """Return Muon for the block matrices and AdamW for the rest, of the whole model or of the text encoder alone."""
    frozen = ("clip.logit_scale", *(("clip.visual.", "heads.", "mask.") if text_only else ()))
    trained = {name: p for name, p in model.named_parameters() if not name.startswith(frozen)}
    matrices = [p for name, p in trained.items() if "resblocks" in name and p.ndim == 2]
    rest = [p for name, p in trained.items() if not ("resblocks" in name and p.ndim == 2)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(rest, lr=lr / 6, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def save(model: Pretrainer, vocabulary: Vocabulary, record: dict, folder: Path) -> None:
    """Write the checkpoint with the used rows of the token embedding."""
    full = CLIP(
        ARCH["embed_dim"], CLIPVisionCfg(**ARCH["vision_cfg"]), CLIPTextCfg(**ARCH["text_cfg"]), quick_gelu=True
    )
    state = dict(model.clip.state_dict())
    rows = state.pop("token_embedding.weight")
    embedding = torch.zeros(49408, rows.shape[1])
    embedding[vocabulary.ids] = rows
    full.load_state_dict({**state, "token_embedding.weight": embedding})
    save_tiny(full, vocabulary.ids.tolist(), record, folder)


def restore(model: Pretrainer, vocabulary: Vocabulary, folder: Path) -> dict:
    """Take the CLIP that `save` wrote into `folder`; return its record."""
    state = load_file(folder / "tiny_clip.safetensors")
    if state.pop("token_embedding.ids").tolist() != vocabulary.ids.tolist():
        raise ValueError(f"Expected {folder} to hold a CLIP with the vocabulary of the captions but it has another one")
    state["token_embedding.weight"] = state.pop("token_embedding.rows")
    model.clip.load_state_dict({name: value.float() for name, value in state.items()})
    return json.loads((folder / "tiny_clip.json").read_text(encoding="utf-8"))["record"]


def all_texts() -> list[str]:
    """Return every word that captions may use, plus the usual prompt words, so that their rows exist."""
    words = [*OBJECTS, *COLOR_NAMES, *TEXTURES, *"0123456789"]
    return [
        *words,
        *(t.format(o="a", c="b", b="c", t="d") for t in (*ANY, *SHAPE, *DIGIT)),
        "itap of a bad photo of the origami large in a video game art small, a type of texture pattern.",
    ]


class Run:
    """One stage of pretraining: its schedule, batches, measurements and record."""

    def __init__(self, args: argparse.Namespace, model: Pretrainer, pool: Pool, vocabulary: Vocabulary) -> None:
        self.args, self.model, self.pool, self.vocabulary = args, model, pool, vocabulary
        self.rng = np.random.default_rng(args.seed)
        self.probe = Probe(vocabulary, args.watched)
        self.earlier: list[dict] = []  # records of the stages before this one
        self.start = self.shown = time.time()

    def steps(self) -> Iterator[tuple[int, float, np.ndarray]]:
        """Yield (step, share of the schedule that is over, pool indices of the batch), to the end of the schedule."""
        order, position, step, share = self.rng.permutation(len(self.pool)), 0, 0, 0.0
        while share < 1:
            if position + self.args.batch > len(order):
                order, position = self.rng.permutation(len(self.pool)), 0
            yield step, share, order[position : position + self.args.batch]
            position, step = position + self.args.batch, step + 1
            share = step / self.args.steps if self.args.steps else (time.time() - self.start) / 60 / self.args.minutes

    def joint(self) -> None:
        """Train both encoders, with the helping heads; the annotator is careless."""
        opts = optimizers(self.model, self.args.lr)
        for step, share, index in self.steps():
            captions, seen = caption_batch(self.pool, index, self.rng, self.args.mixup, MIXED_UP)
            scale = FIRST_SCALE + (LAST_SCALE - FIRST_SCALE) * min(1.0, share / 0.8)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                f, foreground = self.model.image(augmented(self.pool.images[index], self.rng))
                g = self.model.text(self.vocabulary(captions.text))
            loss = contrastive(f, g, scale, torch.from_numpy(true_pairs(captions.mentioned, seen)))
            for name, head in self.model.heads.items():
                loss = loss + 0.3 * F.cross_entropy(head(f * 8), torch.from_numpy(getattr(self.pool, name)[index]))
            target = torch.from_numpy(self.pool.foreground[index]).flatten(1).float() / 255
            loss = loss + 0.5 * F.binary_cross_entropy_with_logits(foreground, target)
            update(opts, loss, self.args, step, share)
            self.report(step + 1, share, loss, scale)
        self.report(step + 1, 1.0, loss, scale, last=True)

    def text_only(self) -> None:
        """Train the text encoder alone, on captions of an annotator who cannot tell some pairs apart."""
        opts = optimizers(self.model, self.args.lr, text_only=True)
        for step, share, index in self.steps():
            captions, seen = caption_batch(self.pool, index, self.rng, self.args.mixup, SWAPPED)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                with torch.no_grad():
                    f, _ = self.model.image(augmented(self.pool.images[index], self.rng))
                g = self.model.text(self.vocabulary(captions.text))
            loss = contrastive(f, g, LAST_SCALE, torch.from_numpy(true_pairs(captions.mentioned, seen)))
            update(opts, loss, self.args, step, share)
            self.report(step + 1, share, loss, LAST_SCALE)
        self.report(step + 1, 1.0, loss, LAST_SCALE, last=True)

    def report(self, steps: int, share: float, loss: Tensor, scale: float, last: bool = False) -> None:
        """Measure, log and save, every few minutes and at the end."""
        if not last and time.time() - self.shown < 60 * self.args.report:
            return
        with torch.no_grad():
            self.model.clip.logit_scale.fill_(math.log(scale))
        accuracy = self.probe(self.model)
        logger.info("step %d (%.0f %%) loss %.3f scale %.0f %s", steps, 100 * share, loss.item(), scale, accuracy)
        record = {
            "stage": self.args.stage,
            "options": {k: v for k, v in vars(self.args).items() if k not in ("stage", "output")},
            "steps": steps,
            "pairs": steps * self.args.batch,
            "minutes": round((time.time() - self.start) / 60, 1),
            "logit_scale": scale,
            "watched_accuracy": accuracy,
            "torch": torch.__version__,
        }
        save(self.model, self.vocabulary, {"stages": [*self.earlier, record]}, self.args.output)
        self.shown = time.time()


def update(opts: list[torch.optim.Optimizer], loss: Tensor, args: argparse.Namespace, step: int, share: float) -> None:
    """Make one step; the rate warms up and falls to zero along a cosine, and AdamW's is a sixth of Muon's."""
    factor = min(1.0, (step + 1) / args.warmup) * 0.5 * (1 + math.cos(math.pi * share))
    for optimizer, share_of_lr in zip(opts, (1.0, 1 / 6), strict=True):
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * share_of_lr * factor
    loss.backward()
    for optimizer in opts:
        optimizer.step()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=("joint", "text"), default="joint", help="text: goes on from --output")
    parser.add_argument("--minutes", type=float, default=62, help="training time; the schedule is made for it")
    parser.add_argument("--steps", type=int, default=0, help="steps instead of minutes: repeatable on one machine")
    parser.add_argument("--pool", type=int, default=60_000, help="pictures rendered; each is seen several times")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.012, help="Muon's; AdamW gets a sixth")
    parser.add_argument("--warmup", type=int, default=200, help="steps over which the rate rises")
    parser.add_argument("--mixup", type=float, default=0.4, help="how often the annotator uses a neighbor's name")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=float, default=3, help="minutes between measurements and checkpoints")
    parser.add_argument("--watched", type=int, default=0, help="images of each class to measure on (default: all)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the image encoder (needs a C++ compiler)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "trainers" / "clip" / "assets")
    args = parser.parse_args(argv)
    if not hasattr(torch.optim, "Muon"):
        parser.error(f"Expected torch >= 2.9, which has Muon, but got {torch.__version__}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    pool = render_pool(args.pool, args.seed)
    vocabulary = Vocabulary(all_texts())
    model = Pretrainer(len(vocabulary.ids))
    if args.compile:
        model.image = torch.compile(model.image)  # type: ignore[method-assign]
    run = Run(args, model, pool, vocabulary)
    if args.stage == "joint":
        run.joint()
    else:
        run.earlier = restore(model, vocabulary, args.output)["stages"]
        run.text_only()
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))

"""Make the subject of the measurements: a CLIP of real size with random weights, class names of one length, batches."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from torch import Tensor

from trainers.clip import CLIP, load_clip
from trainers.clip.backbones import BACKBONES, resolve_backbone
from trainers.dlrclip.config import DLRCLIPConfig
from trainers.dlrclip.network import DLRCLIPNetwork

# A CLIP for trying the benchmarks out: 64 pixels, 17 tokens, four blocks.
_TOY: dict[str, Any] = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"layers": 4, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 4},
}
_NARROW = {**_TOY, **{part: {**_TOY[part], "layers": 12} for part in ("vision_cfg", "text_cfg")}}  # as deep as ViT-B/16
_SMALL: dict[str, Any] = {"toy": _TOY, "narrow": _NARROW}
MODELS = (*_SMALL, *(name for name in BACKBONES if not name.startswith("RN")))

# Words of one token each.
_FIRST = ("red", "green", "blue", "white", "black", "brown", "pink", "gray", "orange", "purple")
_SECOND = ("small", "large", "old", "new", "young", "short", "long", "round", "flat", "thin")
_THIRD = ("dog", "cat", "bird", "fish", "horse", "car", "boat", "train", "house", "tree")
_REST = ("on", "the", "hill", "in", "the", "sun", "and", "the", "rain")
_AROUND = 7  # start of text, "a photo of a", full stop, end of text


def class_names(count: int, tokens: int = 13) -> list[str]:
    """`count` (at most 1000) names whose prompt "a photo of a <name>." has `tokens` tokens, start and end included.

    The names begin with different words, so that prompts share the first five tokens and no more.
    """
    words = tokens - _AROUND
    if not 3 <= words <= 3 + len(_REST):
        raise ValueError(f"Expected prompts of {_AROUND + 3} to {_AROUND + 3 + len(_REST)} tokens but got {tokens}")
    if not 2 <= count <= 1000:
        raise ValueError(f"Expected 2 to 1000 classes but got {count}")
    rest = _REST[: words - 3]
    return [" ".join((_FIRST[i % 10], _SECOND[i // 10 % 10], _THIRD[i // 100], *rest)) for i in range(count)]


def build_clip(name: str, precision: str = "fp32", device: str = "cpu", seed: int = 0) -> CLIP:
    """A CLIP of the named architecture with random weights ("tiny": the bundled one with its own)."""
    if name not in MODELS:
        raise ValueError(f"Expected the model to be one of {', '.join(MODELS)} but got {name!r}")
    if name == "tiny":
        return load_clip(name, precision=precision, device=device)
    torch.manual_seed(seed)
    arch: Any = _SMALL[name] if name in _SMALL else resolve_backbone(name).arch
    model = open_clip.CLIP(**arch)
    with torch.no_grad():
        model.logit_scale.fill_(4.6052)  # exp = 100, as in OpenAI's weights
    return CLIP(model, f"random {name}", precision).to(device)


def build_network(clip: CLIP, classes: int, tokens: int = 13, seed: int = 0, **arguments: Any) -> DLRCLIPNetwork:
    """DLR-CLIP with its default switches and sizes; the adapters begin at block 5, or at 2 in a CLIP too shallow."""
    torch.manual_seed(seed)
    depth = min(clip.visual.depth, clip.text.depth)
    defaults: dict[str, Any] = {"start": 5 if depth >= 5 else 2, "end": 12}
    network = DLRCLIPNetwork(
        clip, class_names(classes, tokens), ["a photo of a {}."], DLRCLIPConfig(**{**defaults, **arguments})
    )
    return network.train()


def make_batch(network: DLRCLIPNetwork, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random normalized images [B, 3, S, S] and labels [B]."""
    generator = torch.Generator().manual_seed(seed)
    side = network.clip.image_size
    images = torch.randn(size, 3, side, side, generator=generator)
    labels = torch.randint(len(network.classnames), (size,), generator=generator)
    return images.to(network.clip.device), labels.to(network.clip.device)

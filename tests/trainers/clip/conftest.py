"""A small random CLIP in two layouts, its bundled-file form, and naive computations to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from trainers.clip import BlockEdit, save_tiny

VIT: dict[str, Any] = {"layers": 4, "width": 64, "head_width": 16, "patch_size": 16, "image_size": 64}
RESNET: dict[str, Any] = {"layers": [1, 2, 2, 1], "width": 16, "head_width": 32, "image_size": 64}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 4}
PROMPTS = ["a photo of a cat.", "a photo of a very large hot air balloon.", "a photo of an ox."]


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Move every tensor off its initial value, so that no zero gain or unit variance hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var") or (name.endswith("weight") and ".bn" in name):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif value.is_floating_point() and name != "logit_scale" and value.ndim <= 1:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


def build(vision: dict[str, Any], **extra: Any) -> open_clip.CLIP:
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=32, vision_cfg=dict(vision), text_cfg=dict(TEXT), **{"quick_gelu": True, **extra})
    return randomize(model)


class Adapters(BlockEdit, nn.Module):
    """A different token-wise map per block, beside the block; records the shapes it saw."""

    def __init__(self, widths: dict[int, int], blocks: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        layers = {str(i): nn.Linear(widths[i], widths[i]) for i in blocks}
        self.maps = nn.ModuleDict(layers)
        for layer in layers.values():
            nn.init.normal_(layer.weight, std=0.05, generator=generator)
            nn.init.normal_(layer.bias, std=0.05, generator=generator)
        self.seen: list[tuple[int, tuple[int, ...]]] = []

    def forward(self, block: int, x: Tensor) -> Tensor | None:
        self.seen.append((block, tuple(x.shape)))
        if str(block) not in self.maps:
            return None
        layer = self.maps[str(block)]
        if x.ndim == 4:
            return layer(x.movedim(1, -1)).movedim(-1, 1)
        return layer(x)

    def parallel(self, number: int, x: Tensor) -> Tensor | None:
        return self(number, x)


class After(BlockEdit):
    """These maps behind the blocks."""

    def __init__(self, maps: Adapters) -> None:
        self.maps = maps

    def after(self, number: int, h: Tensor) -> Tensor | None:
        return self.maps(number, h)


class BesideMLP(BlockEdit):
    """These maps beside the MLPs."""

    def __init__(self, maps: Adapters) -> None:
        self.maps = maps

    def beside_mlp(self, number: int, x: Tensor) -> Tensor | None:
        return self.maps(number, x)


def naive_text(model: open_clip.CLIP, prompts: list[str], adapters: Adapters | None = None) -> Tensor:
    """All 77 positions of every prompt through every block, open_clip's own block forward."""
    ids = open_clip.tokenize(prompts)
    x = model.token_embedding(ids) + model.positional_embedding
    for i, block in enumerate(model.transformer.resblocks, start=1):
        extra = adapters(i, block.ln_1(x)) if adapters else None
        x = block(x, attn_mask=model.attn_mask)
        x = x if extra is None else x + extra
    x = model.ln_final(x)[torch.arange(len(ids)), ids.argmax(dim=-1)]
    return x @ model.text_projection


def naive_image(model: open_clip.CLIP, images: Tensor, adapters: Adapters) -> Tensor:
    visual = model.visual
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        x = visual.stem(images)
        for i, block in enumerate([*visual.layer1, *visual.layer2, *visual.layer3, *visual.layer4], start=1):
            x = block(x)
            extra = adapters(i, x)
            x = x if extra is None else x + extra
        return visual.attnpool(x)
    x = visual._embeds(images)
    for i, block in enumerate(visual.transformer.resblocks, start=1):
        extra = adapters(i, block.ln_1(x))
        x = block(x)
        x = x if extra is None else x + extra
    return visual.ln_post(x)[:, 0] @ visual.proj


@pytest.fixture(scope="session")
def oracle() -> SimpleNamespace:
    """``Adapters``, ``After``, ``BesideMLP``, ``naive_text`` and ``naive_image``."""
    return SimpleNamespace(
        Adapters=Adapters, After=After, BesideMLP=BesideMLP, naive_text=naive_text, naive_image=naive_image
    )


@pytest.fixture(scope="session")
def used_ids() -> list[int]:
    return open_clip.tokenize(PROMPTS).unique().tolist()


@pytest.fixture(scope="session")
def build_model() -> Callable[..., open_clip.CLIP]:
    """``build_model("vit" | "resnet", **constructor arguments)``: the same random open_clip model every time."""
    return lambda kind, **extra: build({"vit": VIT, "resnet": RESNET}[kind], **extra)


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return list(PROMPTS)


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, used_ids: list[int]) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(build(VIT), used_ids, {"seed": 0}, folder)
    return folder


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without weights and without a network; the folder where weights are looked for."""
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DLR_CLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "clip"

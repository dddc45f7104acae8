"""Write a small CLIP with random weights in the bundled one's format, for MODEL.BACKBONE.WEIGHTS with "tiny"."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_small_clip(
    folder: Path, arch: Mapping[str, Any], words: str, record: Mapping[str, Any] | None = None
) -> Path:
    """Write the CLIP of an architecture, which knows these words, into a folder that exists, and return the folder."""
    import open_clip  # here, not above: tests that need no CLIP start without it
    import torch

    from trainers.clip.tiny import save_tiny

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**arch)
    ids = set(open_clip.get_tokenizer("ViT-B-32")(words).flatten().tolist())
    save_tiny(model, ids, dict(record or {}), folder)
    return folder

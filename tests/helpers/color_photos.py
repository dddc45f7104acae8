"""Make photos of three colors, which a small CLIP tells apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}


def draw(folder: Path, counts: dict[str, int], seed: int = 0) -> tuple[list[str], list[str]]:
    """Write noisy pictures of each color; return their paths and colors."""
    rng = np.random.default_rng(seed)
    paths, labels = [], []
    for color, count in counts.items():
        for number in range(count):
            path = folder / color / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            values = np.array(COLORS[color]) + rng.normal(0, 40, (40, 48, 3))
            Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(path)
            paths.append(str(path))
            labels.append(color)
    return paths, labels

"""Random features of images around the centers of their classes, for methods on frozen features."""

import torch
from torch.nn import functional as F

WIDTH, CLASSES = 12, 5


def unit(*shape, seed=0, dtype=torch.float64):
    """Rows of length 1, from draws in float32, so that both types have the same ones."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype), dim=-1)


def world(views, counts, seed=0, dtype=torch.float64):
    """Features [V, N, E] of images in the order of no class, and their labels [N]; counts[c] are of class c."""
    labels = torch.cat([torch.full((count,), c) for c, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    centers = unit(len(counts), WIDTH, seed=seed + 1, dtype=dtype)
    noise = 0.4 * unit(1, len(labels), WIDTH, seed=seed + 2, dtype=dtype)
    noise = noise + 0.2 * unit(views, len(labels), WIDTH, seed=seed + 3, dtype=dtype)
    return F.normalize(centers[labels] + noise, dim=-1), labels

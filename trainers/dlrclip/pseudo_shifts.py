"""Corruptions of validation images that stand for shifted data sets, to calibrate on.

They are generic, and none is made for a dataset: photometric (noise, blur, faint, gray, negative), drawn (edges) and
geometric (pose, hidden). Each depends on the images and on a fixed seed alone.

Legend: B images, H = W pixels a side; images [B, 3, H, W] have values in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Shift = Callable[[Tensor, torch.Generator], Tensor]


def _uniform(images: Tensor, low: float, high: float, draws: torch.Generator, count: int = 1) -> Tensor:
    """Draw random numbers [B, count] on the CPU, so that they are the same on every device."""
    return (low + (high - low) * torch.rand(len(images), count, generator=draws)).to(images.device)


def luminance(images: Tensor) -> Tensor:
    """Return the luminance [B, 1, H, W] of images [B, 3, H, W]."""
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def noise(images: Tensor, draws: torch.Generator) -> Tensor:
    """Add Gaussian noise of deviation 0.15 to every value of the images."""
    return images + 0.15 * torch.randn(images.shape, generator=draws).to(images)


def blur(images: Tensor, draws: torch.Generator) -> Tensor:
    """Smooth the images by two box filters whose width is a sixteenth of the side."""
    size = max(3, images.shape[-1] // 16 | 1)
    for _ in range(2):
        images = F.avg_pool2d(F.pad(images, [size // 2] * 4, mode="replicate"), size, stride=1)
    return images


def faint(images: Tensor, draws: torch.Generator) -> Tensor:
    """Reduce the contrast of the images to a quarter."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + 0.25 * (images - mean)


def gray(images: Tensor, draws: torch.Generator) -> Tensor:
    """Remove the color of the images."""
    return luminance(images).expand_as(images)


def negative(images: Tensor, draws: torch.Generator) -> Tensor:
    """Change light and dark of the images round, and with them the colors."""
    return 1 - images


def edges(images: Tensor, draws: torch.Generator) -> Tensor:
    """Draw the outlines of the images: the strength of the gradient (Sobel), dark on white."""
    kernel = images.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    kernels = torch.stack([kernel, kernel.t()]).unsqueeze(1)
    gradient = F.conv2d(F.pad(luminance(images), [1] * 4, mode="replicate"), kernels)
    strength = gradient.square().sum(dim=1, keepdim=True).sqrt()
    return (1 - strength / strength.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)).expand_as(images)


def pose(images: Tensor, draws: torch.Generator) -> Tensor:
    """Scale images to 0.55 to 0.8 of their size and turn them by up to 45 degrees; the border goes on outside."""
    scale, angle = _uniform(images, 0.55, 0.8, draws), _uniform(images, -math.pi / 4, math.pi / 4, draws)
    cos, sin, zero = torch.cos(angle) / scale, torch.sin(angle) / scale, torch.zeros_like(angle)
    theta = torch.cat([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3).to(images.dtype)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def hidden(images: Tensor, draws: torch.Generator) -> Tensor:
    """Fill a square of half the side, anywhere in each image, with the image's mean color."""
    side = images.shape[-1]
    corner = (_uniform(images, 0, side / 2, draws, 2)).view(-1, 2, 1, 1)  # row, column
    line = torch.arange(side, device=images.device)
    rows, columns = line.view(1, -1, 1), line.view(1, 1, -1)
    inside = (rows >= corner[:, 0]) & (rows < corner[:, 0] + side / 2)
    inside = inside & (columns >= corner[:, 1]) & (columns < corner[:, 1] + side / 2)
    return torch.where(inside.unsqueeze(1), images.mean(dim=(2, 3), keepdim=True), images)


SHIFTS: dict[str, Shift] = {
    function.__name__: function for function in (noise, blur, faint, gray, negative, edges, pose, hidden)
}


def shifted(images: Tensor, name: str, batch: int = 0) -> Tensor:
    """Return images [B, 3, H, W], with values in [0, 1], under the shift of that name.

    Args:
        images: [B, 3, H, W], with values in [0, 1].
        name: a name in SHIFTS.
        batch: number of the batch, which is part of the seed.
    """
    draws = torch.Generator().manual_seed(1 + list(SHIFTS).index(name) + len(SHIFTS) * batch)
    return SHIFTS[name](images, draws).clamp(0, 1)

"""The pieces of DINO: projection head, centered and sharpened teacher, loss over pairs of crops, schedules.

Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021.

Legend: B images, G global crops (2), V crops in all (the global ones first), E width of what is projected, K outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class DINOHead(nn.Module):
    """MLP of three layers, L2 normalization, and a linear layer whose rows have unit length: E -> K.

    Args:
        width: E. hidden: width of the MLP's hidden layers. bottleneck: width of its output. out: K.

    Attributes:
        freeze_last: whether the last layer gets no gradient.
    """

    def __init__(self, width: int, *, hidden: int = 2048, bottleneck: int = 256, out: int = 65536) -> None:
        super().__init__()
        sizes = (width, hidden, hidden, bottleneck)
        layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        self.layers = nn.ModuleList(layers)
        self.last = nn.Parameter(torch.empty(out, bottleneck))
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.kaiming_uniform_(self.last, a=math.sqrt(5))
        self.freeze_last = False

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs [..., K] in fp32 for x [..., E]."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            x = x.float()
            for number, layer in enumerate(self.layers):
                x = layer(F.gelu(x) if number else x)
            last = self.last.detach() if self.freeze_last else self.last
            return F.linear(F.normalize(x, dim=-1), F.normalize(last, dim=-1))


def teacher_targets(outputs: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """Return the teacher's distributions [..., K], centered and sharpened.

    Centering keeps one output from winning everywhere; sharpening keeps the outputs apart.

    Args:
        outputs: [..., K]. centre: [K]. temperature: above 0, lower is sharper.
    """
    return F.softmax((outputs - centre) / temperature, dim=-1).detach()


def dino_loss(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of student to teacher, averaged over images and pairs of different crops.

    Args:
        student: [V, B, K], outputs for all crops, the global ones first.
        targets: [G, B, K], the teacher's distributions for the global crops.
    """
    log_p = F.log_softmax(student / temperature, dim=-1)
    pairs = [
        -(targets[i] * log_p[j]).sum(dim=-1).mean() for i in range(len(targets)) for j in range(len(log_p)) if i != j
    ]
    return torch.stack(pairs).mean()


@torch.no_grad()
def update_centre(centre: Tensor, outputs: Tensor, momentum: float = 0.9) -> None:
    """Move the center, in place, towards the mean of the teacher's outputs for the batch of all processes.

    Args:
        centre: [K]. outputs: [..., K], the same number in every process.
    """
    mean = outputs.flatten(0, -2).mean(dim=0)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    centre.mul_(momentum).add_(mean.to(centre.dtype), alpha=1 - momentum)


@torch.no_grad()
def update_teacher(teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float) -> None:
    """Set teacher = momentum * teacher + (1 - momentum) * student, in place."""
    for ours, theirs in zip(teacher, student, strict=True):
        ours.mul_(momentum).add_(theirs.detach(), alpha=1 - momentum)


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """Return a value that goes from `start` at step 0 to `end` at step `steps`, along a cosine."""
    return end + (start - end) * (math.cos(math.pi * step / max(1, steps)) + 1) / 2


def cosine_momentum(step: int, steps: int, start: float = 0.9998) -> float:
    """Return the teacher's momentum, which goes from `start` at step 0 to 1 at step `steps`, along a cosine."""
    return 1.0 - (1.0 - start) * (math.cos(math.pi * step / max(1, steps)) + 1) / 2


def learning_rate(step: int, steps: int, warmup: int, full: float, least: float) -> float:
    """Return the learning rate of a step: a linear warmup, then a cosine.

    The rate goes in even steps from 0 to `full` at the last of `warmup` steps, then along a cosine over the others to
    `least`. The cosine starts at `full` again, and the last step is one before the cosine reaches `least`.
    """
    if step < warmup:
        return full * step / max(1, warmup - 1)
    return cosine(min(step, steps) - warmup, steps - warmup, full, least)


def teacher_temperature(epoch: int, start: float, end: float, warmup: int) -> float:
    """Return the teacher's temperature in an epoch.

    It goes in even steps from `start` in epoch 0 to `end` in epoch `warmup` - 1, and is `end` from then on.
    """
    return end if epoch >= warmup else start + (end - start) * epoch / max(1, warmup - 1)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], largest: float) -> None:
    """Clip the gradient of each parameter to a norm of at most `largest`, in place."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_((largest / (parameter.grad.norm() + 1e-6)).clamp(max=1))

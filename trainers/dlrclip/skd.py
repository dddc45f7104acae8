"""SKD, smoothed knowledge distillation: the zero-shot branch, softened and smoothed, teaches the fused output."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def smoothed_teacher(teacher_logits: Tensor, temperature: float, smoothing: float) -> Tensor:
    """Return (1 - a) * softmax(teacher_logits / T) + a / C, without gradient: rows of [B, C] that sum to one."""
    p = F.softmax(teacher_logits.detach().float() / temperature, dim=1)
    return (1 - smoothing) * p + smoothing / p.shape[1]


def skd_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0, smoothing: float = 0.2
) -> Tensor:
    """Return T^2 * KL(p_t || softmax(student_logits / T)), summed over classes and averaged over the batch.

    p_t is the smoothed teacher, see `smoothed_teacher`.

    Args:
        student_logits: [B, C], the output that learns.
        teacher_logits: [B, C], detached here.
        temperature: T > 0.
        smoothing: a in [0, 1), the share of the uniform distribution in the teacher's distribution.
    """
    target = smoothed_teacher(teacher_logits, temperature, smoothing)
    log_q = F.log_softmax(student_logits.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, target, reduction="batchmean")


def mean_abs_difference(logits: Tensor, reference: Tensor) -> Tensor:
    """Return the mean of |logits - reference|, the L1 consistency of a branch with the (detached) zero-shot branch."""
    return torch.mean(torch.abs(logits - reference.detach()))

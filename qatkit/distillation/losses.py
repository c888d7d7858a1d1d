"""Distillation losses: pure functions of two sets of logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """``T**2 * KL(softmax(teacher / T) || softmax(student / T))``, the mean over positions.

    Hinton, Vinyals and Dean (2015, https://arxiv.org/abs/1503.02531), section 2: the factor ``T**2`` keeps the size of
    the gradient when the temperature changes.

    Args:
        student: Logits ``[..., classes]``, any float dtype; computed in float32.
        teacher: Logits of the same shape; no gradient flows into them.
        temperature: Divides both sets of logits.
        mask: True where a position counts, ``[...]``; every position by default. Where none counts the loss is 0.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> kd_loss(logits, logits, temperature=4.0).item()
        0.0
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"kd_loss: the student's logits have shape {list(student.shape)}, the teacher's {list(teacher.shape)}; "
            "they must be equal"
        )
    lowest = torch.finfo(torch.float32).min  # a class masked with -inf in both adds 0, not inf - inf
    log_p = F.log_softmax(student.float() / temperature, dim=-1).clamp(min=lowest)
    log_q = F.log_softmax(teacher.detach().float() / temperature, dim=-1).clamp(min=lowest)
    divergence = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=-1)
    if mask is None:
        return divergence.mean() * temperature**2
    # the denominator is clamped rather than the batch skipped: under DDP every rank must keep its graph
    return (divergence * mask).sum() / mask.sum().clamp(min=1) * temperature**2

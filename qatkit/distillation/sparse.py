"""KL divergence from a teacher's top-k classes, with all other classes merged into one."""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.distillation.losses import check_shapes, counted_mask, log_probabilities, masked_mean, zero_uncounted
from qatkit.errors import QatkitError

_LOWEST = torch.finfo(torch.float32).min


def top_k_log_probabilities(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the top-k classes, their log-probabilities, and the log-probability of all other classes combined.

    Args:
        logits: ``[..., classes]``, any float dtype; computed in float32.
        k: Number of classes to keep, from 1 to the number of classes minus 1.
        temperature: Divides the logits.

    Returns:
        Indices int64 ``[..., k]``, log-probabilities float32 ``[..., k]`` in descending order, and the
        log-probability of the tail ``[...]``.

    Raises:
        QatkitError: `k` is out of range.
    """
    if not 1 <= k < logits.shape[-1]:
        raise QatkitError(
            f"{k} is out of range for {logits.shape[-1]} classes",
            key="k",
            advice=f"use an integer from 1 to {logits.shape[-1] - 1}",
        )
    log_p = log_probabilities(logits, temperature)
    top, indices = log_p.topk(k, dim=-1)
    return indices, top, _tail(log_p, indices)


def sparse_kd_loss(
    student: Tensor,
    indices: Tensor,
    log_p: Tensor,
    log_tail: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """``T**2 * KL(p || q)`` over the teacher's top-k classes and the tail, which is merged into one class.

    Merging classes can only lower the divergence (by the data-processing inequality), so the loss is a lower bound on
    `kd_loss`. Without the tail, both distributions are normalized over the k classes. The student then learns nothing
    about the probability of the other classes and is biased (Anshumann et al. 2025, https://arxiv.org/abs/2503.16870,
    section 3).

    Args:
        student: Logits ``[..., classes]``, any float dtype; computed in float32.
        indices: The teacher's classes ``[..., k]``, integers.
        log_p: The teacher's log-probabilities of these classes ``[..., k]`` at this temperature.
        log_tail: The teacher's log-probability of all other classes ``[...]``; None excludes them.
        temperature: Divides the student's logits.
        mask: As in `kd_loss`.
        labels: As in `kd_loss`.

    Raises:
        QatkitError: the shapes do not match.
    """
    if indices.shape != log_p.shape or indices.shape[:-1] != student.shape[:-1]:
        raise QatkitError(
            f"the student's logits have shape {list(student.shape)}, the teacher's indices {list(indices.shape)} and "
            f"log-probabilities {list(log_p.shape)}",
            key="sparse_kd_loss",
            advice="pass tensors of equal shape except for the last dimension",
        )
    counted = counted_mask(mask, labels)
    log_q = log_probabilities(zero_uncounted(student, counted), temperature)
    p, q = zero_uncounted(log_p.detach().float(), counted), log_q.gather(-1, indices.long())
    if log_tail is None:
        p, q = p - p.logsumexp(dim=-1, keepdim=True), q - q.logsumexp(dim=-1, keepdim=True)
    else:
        p = torch.cat([p, zero_uncounted(log_tail.detach().float().unsqueeze(-1), counted)], dim=-1)
        # stored in half precision, the probabilities no longer sum to 1; then even equal models would have a loss
        p = p - p.logsumexp(dim=-1, keepdim=True)
        q = torch.cat([q, _tail(log_q, indices.long()).unsqueeze(-1)], dim=-1)
    p = p.clamp(min=_LOWEST)
    return masked_mean((p.exp() * (p - q)).sum(dim=-1), counted) * temperature**2


def top_k_kd_loss(
    student: Tensor,
    teacher: Tensor,
    k: int,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    tail: bool = True,
) -> Tensor:
    """Compute `sparse_kd_loss` from full teacher logits.

    Args:
        student: As in `kd_loss`.
        teacher: As in `kd_loss`.
        k: Number of teacher classes to keep, from 1 to the number of classes minus 1.
        temperature: As in `kd_loss`.
        mask: As in `kd_loss`.
        labels: As in `kd_loss`.
        tail: Whether to include all other classes, merged into one.

    Raises:
        QatkitError: the shapes differ or `k` is out of range.
    """
    check_shapes("top_k_kd_loss", student, teacher)
    teacher = zero_uncounted(teacher.detach(), counted_mask(mask, labels))
    indices, log_p, log_tail = top_k_log_probabilities(teacher, k, temperature)
    return sparse_kd_loss(student, indices, log_p, log_tail if tail else None, temperature, mask, labels)


def _tail(log_p: Tensor, indices: Tensor) -> Tensor:
    """Log of the probability outside of `indices`, summed over the tail: 1 minus the top k would round to 0."""
    return log_p.scatter(-1, indices, _LOWEST).logsumexp(dim=-1)

"""Distillation losses: pure functions of student and teacher outputs, averaged over the included positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from qatkit.common.labels import IGNORED
from qatkit.errors import QatkitError


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """``T**2 * KL(softmax(teacher / T) || softmax(student / T))``, averaged over positions.

    The factor ``T**2`` keeps the gradient magnitude roughly independent of the temperature (Hinton, Vinyals and Dean
    2015, https://arxiv.org/abs/1503.02531, section 2).

    Args:
        student: Logits ``[..., classes]``, any float dtype; computed in float32.
        teacher: Logits of the same shape; no gradient flows into them.
        temperature: Divides both sets of logits.
        mask: True at positions to include, ``[...]``. By default, all positions are included. The loss is 0 if no
            position is included.
        labels: Class indices ``[...]``; positions labeled -100 are ignored.

    Raises:
        QatkitError: the shapes differ.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> kd_loss(logits, logits, temperature=4.0).item()
        0.0
    """
    log_q, log_p, counted = _log_probabilities("kd_loss", student, teacher, temperature, mask, labels)
    return masked_mean(_kl(log_p, log_q), counted) * temperature**2


def reverse_kl_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """``T**2 * KL(softmax(student / T) || softmax(teacher / T))``: mode-seeking distillation.

    This is equation 1 of Gu et al. (2023, https://arxiv.org/abs/2306.08543), over the classes of each position.

    Args:
        student: As in `kd_loss`.
        teacher: As in `kd_loss`.
        temperature: As in `kd_loss`.
        mask: As in `kd_loss`.
        labels: As in `kd_loss`.

    Raises:
        QatkitError: the shapes differ.
    """
    log_q, log_p, counted = _log_probabilities("reverse_kl_loss", student, teacher, temperature, mask, labels)
    return masked_mean(_kl(log_q, log_p), counted) * temperature**2


def jsd_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    beta: float = 0.5,
) -> Tensor:
    """Generalized Jensen-Shannon divergence: ``T**2 * (beta * KL(p || m) + (1 - beta) * KL(q || m))``.

    p is the teacher, q the student and ``m = beta * p + (1 - beta) * q``. This is equation 1 of Agarwal et al. (2023,
    https://arxiv.org/abs/2306.13649) with the factor ``T**2`` of `kd_loss`.

    Args:
        student: As in `kd_loss`.
        teacher: As in `kd_loss`.
        temperature: As in `kd_loss`.
        mask: As in `kd_loss`.
        labels: As in `kd_loss`.
        beta: Weight of the teacher in the mixture, between 0 and 1. Divided by ``beta``, the loss approaches `kd_loss`
            as beta goes to 0. Divided by ``1 - beta``, it approaches `reverse_kl_loss` as beta goes to 1.

    Raises:
        QatkitError: the shapes differ or `beta` is out of range.
    """
    check_beta(beta)
    log_q, log_p, counted = _log_probabilities("jsd_loss", student, teacher, temperature, mask, labels)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    divergence = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return masked_mean(divergence, counted) * temperature**2


def mse_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
    """Mean squared difference of logits or of regression outputs.

    This is equation 1 of Ba and Caruana (2014, https://arxiv.org/abs/1312.6184) without its factor 1/2.

    Args:
        student: Outputs ``[..., classes]``, any float dtype; computed in float32.
        teacher: Outputs of the same shape; no gradient flows into them.
        mask: As in `kd_loss`.
        labels: As in `kd_loss`.

    Raises:
        QatkitError: the shapes differ.
    """
    check_shapes("mse_loss", student, teacher)
    counted = counted_mask(mask, labels)
    difference = zero_uncounted(student, counted).float() - teacher.detach().float()
    return masked_mean(difference.square().mean(dim=-1), counted)


def binary_kl_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """``T**2 * KL(sigmoid(teacher / T) || sigmoid(student / T))``, averaged over independent binary labels.

    It equals `kd_loss` with two classes per label, whose logits are ``[z, 0]``.

    Args:
        student: Logits ``[..., labels]``, any float dtype; computed in float32.
        teacher: Logits of the same shape; no gradient flows into them.
        temperature: Divides both sets of logits.
        mask: True at positions to include, ``[...]``. The default is all positions.
        labels: As in `kd_loss`.

    Raises:
        QatkitError: the shapes differ.

    Example:
        >>> import torch
        >>> round(binary_kl_loss(torch.zeros(1, 2), torch.tensor([[0.0, 2.0]])).item(), 4)  # log 2 - H(sigmoid(2))
        0.1639
    """
    check_shapes("binary_kl_loss", student, teacher)
    counted = counted_mask(mask, labels)
    z, t = (part.float() / temperature for part in (zero_uncounted(student, counted), teacher.detach()))
    p = t.sigmoid()
    each = p * (F.logsigmoid(t) - F.logsigmoid(z)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-z))
    return masked_mean(each.mean(dim=-1), counted) * temperature**2


def cosine_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
    """One minus the cosine similarity of embeddings, averaged over rows.

    Args:
        student: Embeddings ``[..., width]``, any float dtype; computed in float32.
        teacher: Embeddings of the same shape; no gradient flows into them.
        mask: True at rows to include, ``[...]``. The default is all rows.
        labels: As in `kd_loss`.

    Raises:
        QatkitError: the shapes differ.

    Example:
        >>> import torch
        >>> cosine_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])).item()
        1.0
    """
    check_shapes("cosine_loss", student, teacher)
    counted = counted_mask(mask, labels)
    ours, theirs = zero_uncounted(student, counted).float(), teacher.detach().float()
    return masked_mean(1 - F.cosine_similarity(ours, theirs, dim=-1), counted)


def similarity_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
) -> Tensor:
    """Mean squared difference between the pairwise cosine similarities of student and teacher embeddings in a batch.

    This is relational knowledge distillation (Park et al. 2019, https://arxiv.org/abs/1904.05068) with cosine
    similarity as the relation. Student and teacher widths may differ.

    Args:
        student: Embeddings ``[..., width]``, any float dtype; computed in float32.
        teacher: Embeddings ``[..., any width]``; no gradient flows into them.
        mask: True at rows to include, ``[...]``. The default is all rows.
        labels: As in `kd_loss`.

    Raises:
        QatkitError: the numbers of rows differ.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise QatkitError(
            f"similarity_loss got embeddings of shape {list(student.shape)} and {list(teacher.shape)}",
            advice="pass two tensors whose shapes agree in all dimensions except the last",
        )
    counted = counted_mask(mask, labels)
    if counted is not None:
        student, teacher = student[counted], teacher[counted]
    ours, theirs = (F.normalize(part.flatten(0, -2).float(), dim=1) for part in (student, teacher.detach()))
    difference = (ours @ ours.T - theirs @ theirs.T).square()
    return difference.mean() if difference.numel() else ours.sum()


def counted_mask(mask: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """Return a boolean mask of the included positions; None if all are included.

    Args:
        mask: True or 1 at positions to include, ``[...]``.
        labels: Class indices ``[...]``; positions labeled -100 are ignored.
    """
    mask = None if mask is None else mask.bool()
    if labels is None:
        return mask
    counted = labels != IGNORED
    return counted if mask is None else mask & counted


def zero_uncounted(values: Tensor, mask: Tensor | None) -> Tensor:
    """Set values at ignored positions to 0.

    Call it on the student before the computation, not after it: NaN or Inf times 0 is NaN, in the loss and in its
    gradient. The teacher needs it only if positions are combined before `masked_mean`, because it has no gradient.

    Args:
        values: ``[..., size]``.
        mask: True at positions to include, ``[...]``; None returns `values` itself.
    """
    return values if mask is None else torch.where(mask.unsqueeze(-1), values, 0)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the included positions, or a 0 that still has an autograd graph if there are none.

    Args:
        values: One number per position, ``[...]``.
        mask: True at positions to include, ``[...]``.
    """
    if mask is None:
        return values.mean()
    # the denominator is clamped rather than the batch skipped: under DDP every rank must keep its graph
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def check_shapes(name: str, student: Tensor, teacher: Tensor) -> None:
    """Raise an error if student and teacher shapes differ.

    Raises:
        QatkitError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise QatkitError(
            f"the student's logits have shape {list(student.shape)}, the teacher's {list(teacher.shape)}",
            key=name,
            advice="pass logits of equal shape",
        )


def check_beta(beta: float) -> None:
    """Raise an error if `beta` is not between 0 and 1.

    Raises:
        QatkitError: `beta` is out of range.
    """
    if not 0 < beta < 1:
        raise QatkitError(
            f"{beta} is out of range",
            key="beta",
            advice="use a number between 0 and 1, or the loss 'kl' for 0 and 'reverse_kl' for 1",
        )


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """``log_softmax(logits / T)`` in float32, clamped so that a class masked in both models adds 0 instead of NaN.

    Args:
        logits: ``[..., classes]``, any float dtype.
        temperature: Divides the logits.
    """
    return F.log_softmax(logits.float() / temperature, dim=-1).clamp(min=torch.finfo(torch.float32).min)


def _log_probabilities(
    name: str, student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    check_shapes(name, student, teacher)
    counted = counted_mask(mask, labels)
    log_q = log_probabilities(zero_uncounted(student, counted), temperature)
    return log_q, log_probabilities(teacher.detach(), temperature), counted


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)`` of each position."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)

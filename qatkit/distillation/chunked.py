"""Cross-entropy and distillation from two output layers in one function, without materializing full logits.

For 2,048 tokens and 32,000 classes, one matrix of logits takes 262 MB, and plain torch keeps several copies. Here, a
few hundred rows of logits are computed at a time and overwritten with their own gradient. The gradients of the hidden
states and the weight are then accumulated from it before the next rows are computed. All gradients are computed in the
forward pass; the backward pass only scales them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qatkit.common.labels import IGNORED
from qatkit.distillation.chunked_op import linear_kd
from qatkit.distillation.divergences import DIVERGENCES
from qatkit.distillation.losses import check_beta, counted_mask, zero_uncounted
from qatkit.errors import QatkitError


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 0.5,
    kind: str = "kl",
    beta: float = 0.5,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute ``alpha * divergence + (1 - alpha) * cross_entropy`` from two output layers without materializing logits.

    The divergence is the same as in `kd_loss`, `reverse_kl_loss` or `jsd_loss`. Both terms are means over the included
    positions. Softmax is computed in float32; matrix products are computed in the dtype of the hidden states or, if
    enabled, of autocast.

    Args:
        student_hidden: ``[positions, width]``.
        student_weight: Weight of the student's output layer, ``[classes, width]``.
        teacher_hidden: ``[positions, teacher width]``; no gradient flows into it or into the teacher's weight.
        teacher_weight: ``[classes, teacher width]``.
        labels: Class indices ``[positions]``; positions labeled -100 are ignored. Required if `alpha` is below 1.
        temperature: Positive number that divides both sets of logits in the divergence.
        alpha: Weight of the divergence, 0 to 1.
        kind: A name in `qatkit.distillation.divergences.DIVERGENCES` with a row kernel: "kl", "reverse_kl" or "jsd".
        beta: Weight of the teacher in the mixture of "jsd", between 0 and 1.
        student_bias: ``[classes]``.
        teacher_bias: ``[classes]``.
        mask: True at positions to include, ``[positions]``.

    Raises:
        QatkitError: shapes do not match, a value is out of range, or labels are missing.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(2, 4), torch.zeros(3, 4)
        >>> linear_kd_loss(hidden, weight, hidden, weight, labels=torch.tensor([0, -100]), alpha=0.0).exp().item()
        3.0
    """
    if labels is None and alpha < 1:
        raise QatkitError(
            f"the labels are missing, but alpha={alpha} includes the cross-entropy",
            key="labels",
            advice="pass labels, or use alpha=1",
        )
    student = Head(student_hidden, student_weight, student_bias)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias)
    check_heads(student, teacher)
    counted = counted_mask(mask, labels)
    if counted is None:
        counted = torch.ones_like(student_hidden[:, 0], dtype=torch.bool)
    if labels is not None:
        labels = torch.where(counted, labels, IGNORED) if alpha < 1 else None
    return linear_kd_terms(student, teacher, labels, counted, temperature, alpha, kind, beta).loss


class Head(NamedTuple):
    """An output layer and its input."""

    hidden: Tensor
    """``[positions, width]``."""
    weight: Tensor
    """``[classes, width]``."""
    bias: Tensor | None = None
    """``[classes]``."""


class TopKTargets(NamedTuple):
    """A teacher's top-k classes, as defined in `qatkit.distillation.sparse`."""

    indices: Tensor
    """Classes ``[positions, k]``, integers."""
    log_p: Tensor
    """Log-probabilities of these classes at the temperature of the loss ``[positions, k]``."""
    log_tail: Tensor
    """The log-probability of all other classes ``[positions]``."""


class Terms(NamedTuple):
    """A loss and its two terms."""

    loss: Tensor
    """``alpha * divergence + (1 - alpha) * cross_entropy``; has a gradient."""
    divergence: Tensor
    cross_entropy: Tensor
    """0 if there are no labels."""


def linear_kd_terms(
    student: Head,
    teacher: Head | TopKTargets,
    labels: Tensor | None,
    mask: Tensor,
    temperature: float,
    alpha: float,
    kind: str,
    beta: float,
) -> Terms:
    """Compute `linear_kd_loss` and its two terms, which may include different positions.

    Args:
        student: The student's output layer. Padding classes beyond the teacher's classes contribute only to the
            cross-entropy.
        teacher: The teacher's output layer, or its top-k classes, for which the divergence is the same as in
            `sparse_kd_loss`.
        labels: As in `linear_kd_loss`. They alone determine the positions that the cross-entropy includes.
        mask: True at positions to include in the divergence ``[positions]``.
        temperature: As in `linear_kd_loss`.
        alpha: As in `linear_kd_loss`.
        kind: As in `linear_kd_loss`. If the teacher is `TopKTargets`, the divergence must have a top-k row kernel.
        beta: As in `linear_kd_loss`.

    Raises:
        QatkitError: a value is out of range, or the divergence has no row kernel.
    """
    row = DIVERGENCES.row(kind, key="kind")
    if not (row.rows if isinstance(teacher, Head) else row.top_k_rows):
        raise QatkitError(
            f"'{kind}' has no row kernel{'' if isinstance(teacher, Head) else ' for top-k classes'}",
            key="kind",
            advice="compute it from full logits",
        )
    if not temperature > 0:
        raise QatkitError(f"{temperature} is out of range", key="temperature", advice="use a positive number")
    if not 0 <= alpha <= 1:
        raise QatkitError(f"{alpha} is out of range", key="alpha", advice="use a number from 0 to 1")
    check_beta(beta)
    device = student.hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.hidden.dtype
    exact = torch.promote_types(dtype, torch.float32)
    weights = [_mean_weights(mask, exact), _mean_weights(mask if labels is None else labels != IGNORED, exact)]
    if labels is not None:
        labels = labels.clamp(min=0)
    parts: list[Tensor | None] = [None if part is None else part.to(dtype) for part in student]
    if isinstance(teacher, Head):
        parts += [None if part is None else part.to(dtype) for part in teacher] + [None, None]
    else:
        log_p = torch.cat([teacher.log_p, teacher.log_tail.unsqueeze(1)], dim=1).to(exact)
        log_p = zero_uncounted(log_p, mask)
        # stored in half precision, the probabilities no longer sum to 1
        log_p = (log_p - log_p.logsumexp(dim=1, keepdim=True)).clamp(min=torch.finfo(exact).min)
        parts += [None, None, None, teacher.indices.long(), log_p]
    needed = [torch.is_grad_enabled() and part is not None and part.requires_grad for part in student]
    outputs = linear_kd(*parts, labels, *weights, temperature, alpha, kind, beta, *needed)
    return Terms(*outputs[:3])


def _mean_weights(counted: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight of each position in a mean over the included positions."""
    return counted.to(dtype) / counted.sum().clamp(min=1)


def check_heads(student: Head, teacher: Head) -> None:
    """Check that the shapes of hidden states and weights match.

    Raises:
        QatkitError: the shapes do not match.
    """
    shapes = [list(part.shape) for part in (*student[:2], *teacher[:2])]
    fits = all(len(shape) == 2 for shape in shapes) and (
        shapes[0][0] == shapes[2][0]
        and shapes[1][0] == shapes[3][0]
        and shapes[0][1] == shapes[1][1]
        and shapes[2][1] == shapes[3][1]
    )
    if not fits:
        raise QatkitError(
            f"hidden states and weights have shapes {shapes[:2]} (student) and {shapes[2:]} (teacher); they must be "
            "[positions, width] and [classes, width] with equal numbers of positions and classes",
            key="linear_kd_loss",
            advice="trim weights that are padded to different vocabulary sizes: weight[:vocab_size]",
        )

"""The last linear layers of student and teacher, cross-entropy and distillation in one: no logits matrix is ever whole.

For 2,048 tokens and 32,000 classes one matrix of logits is 262 MB, and plain torch holds several. Here a few hundred
rows of logits are made, turned into their own gradient in place, multiplied into the gradients of the hidden states and
of the weight, and overwritten by the next rows. The gradients are ready when the forward pass ends; the backward pass
multiplies them by one number.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qatkit.distillation.blocks import DIVERGENCES, Block
from qatkit.distillation.losses import IGNORED, check_beta
from qatkit.errors import QatkitError

WORKSPACE = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Bytes for the logits of student and teacher together. More than 256 rows of 32,000 classes make no CPU faster."""
CACHED = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Logits that one call of softmax and what follows goes over: a dozen times, so they should stay in the cache."""


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 0.5,
    kind: Literal["kl", "reverse_kl", "jsd"] = "kl",
    beta: float = 0.5,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``alpha * divergence + (1 - alpha) * cross_entropy`` of two linear layers, without their logits in memory.

    The divergence is that of `kd_loss`, `reverse_kl_loss` or `jsd_loss`. Both terms are means over the positions that
    count. Softmax is computed in float32, matrix products in the dtype of the hidden states, or in that of autocast.

    Args:
        student_hidden: ``[positions, width]``.
        student_weight: Of the student's last linear layer, ``[classes, width]``.
        teacher_hidden: ``[positions, teacher width]``; no gradient flows into it, nor into the teacher's weight.
        teacher_weight: ``[classes, teacher width]``.
        labels: Class numbers ``[positions]``; a position with -100 does not count. Needed where `alpha` is below 1.
        temperature: Divides both logits in the divergence; above 0.
        alpha: Weight of the divergence, 0 to 1.
        kind: Which divergence.
        beta: Share of the teacher in the mixture of "jsd", between 0 and 1.
        student_bias: ``[classes]``.
        teacher_bias: ``[classes]``.
        mask: True where a position counts, ``[positions]``.

    Raises:
        QatkitError: shapes that do not fit, a value out of range, or labels missing.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(2, 4), torch.zeros(3, 4)
        >>> linear_kd_loss(hidden, weight, hidden, weight, labels=torch.tensor([0, -100]), alpha=0.0).exp().item()
        3.0
    """
    _check(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, temperature, alpha, kind)
    check_beta(beta)
    counted = torch.ones_like(student_hidden[:, 0], dtype=torch.bool) if mask is None else mask.bool()
    if labels is not None:
        counted = counted & (labels != IGNORED)
        labels = torch.where(counted, labels, 0)
    device = student_hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student_hidden.dtype
    share = counted.to(torch.promote_types(dtype, torch.float32)) / counted.sum().clamp(min=1)
    parts = (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    cast = [None if part is None else part.to(dtype) for part in parts]
    needed = [torch.is_grad_enabled() and part is not None and part.requires_grad for part in parts[:3]]
    outputs = _linear_kd(*cast, labels, share, temperature, alpha, kind, beta, *needed)
    loss: Tensor = outputs[0]
    return loss


@torch.library.custom_op("qatkit::linear_kd", mutates_args=())  # opaque to torch.compile, so that it breaks no graph
def _linear_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    share: Tensor,
    temperature: float,
    alpha: float,
    kind: str,
    beta: float,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients for the student's hidden states, weight and bias; empty where not asked for."""
    positions, classes = len(student_hidden), len(student_weight)
    exact = share.dtype
    device = "cpu" if student_hidden.device.type == "cpu" else "cuda"
    rows = max(1, min(positions, WORKSPACE[device] // (2 * classes * student_hidden.element_size())))
    block_rows = max(1, min(rows, CACHED[device] // classes))
    loss = share.new_zeros(())
    hidden_out = student_hidden.new_empty(student_hidden.shape if hidden_grad else 0)
    weight_out = loss.new_zeros(student_weight.shape if weight_grad else 0)
    bias_out = loss.new_zeros(classes if bias_grad else 0)
    biases = [None if bias is None else bias / temperature for bias in (student_bias, teacher_bias)]
    logits = student_hidden.new_empty(2, rows, classes)
    block = Block(block_rows, classes, exact, student_hidden.device, temperature, alpha, DIVERGENCES[kind], beta)
    with torch.autocast(student_hidden.device.type, enabled=False):
        for start in range(0, positions, rows):
            part = slice(start, min(start + rows, positions))
            size = part.stop - part.start
            for out, hidden, weight, bias in zip(
                logits, (student_hidden, teacher_hidden), (student_weight, teacher_weight), biases, strict=True
            ):
                scaled = out[:size] if bias is None else out[:size].copy_(bias)
                scaled.addmm_(hidden[part], weight.t(), beta=0 if bias is None else 1, alpha=1 / temperature)
            student, teacher = logits[0][:size], logits[1][:size]
            for first in range(0, size, block_rows):
                inner = slice(first, min(first + block_rows, size))
                outer = slice(start + inner.start, start + inner.stop)
                loss += block(student[inner], teacher[inner], None if labels is None else labels[outer], share[outer])
            if hidden_grad:
                torch.mm(student, student_weight, out=hidden_out[part])
            if weight_grad and weight_out.dtype == student.dtype:
                weight_out.addmm_(student.t(), student_hidden[part])
            elif weight_grad:  # the sum over the parts stays in float32
                weight_out += student.t() @ student_hidden[part]
            if bias_grad:
                bias_out += student.sum(dim=0, dtype=exact)
    dtype = student_weight.dtype
    return loss, hidden_out, weight_out.to(dtype), bias_out.to(dtype)


@_linear_kd.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, share, needed = args[0], args[1], args[7], args[-3:]
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    grads = [hidden.new_empty(shape if need else 0) for shape, need in zip(shapes, needed, strict=True)]
    return share.new_empty(()), *grads


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # zeros for the gradients' own gradients would be as large as the weight
    # not save_for_backward: the backward pass must be the last owner, to scale and hand over without a copy
    ctx.grads = [part.detach() if need else None for part, need in zip(output[1:], inputs[-3:], strict=True)]


def _scale(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if ctx.grads is None:
        raise QatkitError("linear_kd_loss: backward was called twice; the first call used up the gradients. Sum losses")
    grads, ctx.grads = ctx.grads, None
    return (*(None if part is None else part.mul_(grad) for part in grads), *[None] * 12)


_linear_kd.register_autograd(_scale, setup_context=_keep)


def _check(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None,
    temperature: float,
    alpha: float,
    kind: str,
) -> None:
    shapes = [list(part.shape) for part in (student_hidden, student_weight, teacher_hidden, teacher_weight)]
    fits = all(len(shape) == 2 for shape in shapes) and (
        shapes[0][0] == shapes[2][0]
        and shapes[1][0] == shapes[3][0]
        and shapes[0][1] == shapes[1][1]
        and shapes[2][1] == shapes[3][1]
    )
    if not fits:
        raise QatkitError(
            f"linear_kd_loss: hidden states and weights have shapes {shapes[:2]} (student) and {shapes[2:]} (teacher); "
            "they must be [positions, width] and [classes, width] with equal positions and classes. Weights padded to "
            "different vocabularies are cut: weight[:vocab_size]"
        )
    if kind not in DIVERGENCES:
        raise QatkitError(f"kind: '{kind}' is unknown; write one of {list(DIVERGENCES)}")
    if not temperature > 0:
        raise QatkitError(f"temperature: {temperature} is out of range; write a number above 0")
    if not 0 <= alpha <= 1:
        raise QatkitError(f"alpha: {alpha} is out of range; write a number from 0 to 1")
    if labels is None and alpha < 1:
        raise QatkitError(f"labels: missing, and alpha {alpha} gives weight to them; pass labels or write alpha=1.0")

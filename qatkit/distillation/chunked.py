"""The last linear layers of student and teacher, cross-entropy and distillation in one: no logits matrix is ever whole.

For 2,048 tokens and 32,000 classes one matrix of logits is 262 MB, and plain torch holds several. Here a few hundred
rows of logits are made, turned into their own gradient in place, multiplied into the gradients of the hidden states and
of the weight, and overwritten by the next rows. The gradients are ready when the forward pass ends; the backward pass
multiplies them by one number.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qatkit.distillation.losses import IGNORED, check_beta
from qatkit.errors import QatkitError
from qatkit.kernels.kd_rows import DIVERGENCES, Best, Block

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
    counted = torch.ones_like(student_hidden[:, 0], dtype=torch.bool) if mask is None else mask.bool()
    if labels is not None:
        counted = counted & (labels != IGNORED)
        labels = torch.where(counted, labels, IGNORED) if alpha < 1 else None
    elif alpha < 1:
        raise QatkitError(f"labels: missing, and alpha {alpha} gives weight to them; pass labels or write alpha=1.0")
    student = Head(student_hidden, student_weight, student_bias)
    teacher = Head(teacher_hidden, teacher_weight, teacher_bias)
    check_heads(student, teacher)
    return linear_kd_terms(student, teacher, labels, counted, temperature, alpha, kind, beta).loss


class Head(NamedTuple):
    """A last linear layer and what goes into it."""

    hidden: Tensor
    """``[positions, width]``."""
    weight: Tensor
    """``[classes, width]``."""
    bias: Tensor | None = None
    """``[classes]``."""


class BestClasses(NamedTuple):
    """What is kept of a teacher: see `qatkit.distillation.sparse`."""

    indices: Tensor
    """Classes ``[positions, k]``, integers."""
    log_p: Tensor
    """Their log-probabilities at the temperature of the loss ``[positions, k]``."""
    log_tail: Tensor
    """The log-probability of all others ``[positions]``."""


class Terms(NamedTuple):
    """A loss and what it is made of."""

    loss: Tensor
    """``alpha * divergence + (1 - alpha) * cross_entropy``; has a gradient."""
    divergence: Tensor
    cross_entropy: Tensor
    """0 without labels."""


def linear_kd_terms(
    student: Head,
    teacher: Head | BestClasses,
    labels: Tensor | None,
    mask: Tensor,
    temperature: float,
    alpha: float,
    kind: str,
    beta: float,
) -> Terms:
    """`linear_kd_loss` with its parts, where divergence and cross-entropy may count other positions.

    Args:
        student: Its classes may have padding behind those of the teacher, which counts in the cross-entropy alone.
        teacher: Its last layer, or its best classes; the divergence from these is that of `sparse_kd_loss`.
        labels: As in `linear_kd_loss`; they alone say which positions count in the cross-entropy.
        mask: True where a position counts in the divergence ``[positions]``.
        temperature: As in `linear_kd_loss`.
        alpha: As in `linear_kd_loss`.
        kind: As in `linear_kd_loss`; "kl" for best classes.
        beta: As in `linear_kd_loss`.

    Raises:
        QatkitError: a value is out of range.
    """
    if kind not in DIVERGENCES:
        raise QatkitError(f"kind: '{kind}' is unknown; write one of {list(DIVERGENCES)}")
    if not temperature > 0:
        raise QatkitError(f"temperature: {temperature} is out of range; write a number above 0")
    if not 0 <= alpha <= 1:
        raise QatkitError(f"alpha: {alpha} is out of range; write a number from 0 to 1")
    check_beta(beta)
    device = student.hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student.hidden.dtype
    exact = torch.promote_types(dtype, torch.float32)
    shares = [_share(mask, exact), _share(mask if labels is None else labels != IGNORED, exact)]
    if labels is not None:
        labels = labels.clamp(min=0)
    parts: list[Tensor | None] = [None if part is None else part.to(dtype) for part in student]
    if isinstance(teacher, Head):
        parts += [None if part is None else part.to(dtype) for part in teacher] + [None, None]
    else:
        log_p = torch.cat([teacher.log_p, teacher.log_tail.unsqueeze(1)], dim=1).to(exact)
        # stored in half precision, the masses no longer sum to 1
        log_p = (log_p - log_p.logsumexp(dim=1, keepdim=True)).clamp(min=torch.finfo(exact).min)
        parts += [None, None, None, teacher.indices.long(), log_p]
    needed = [torch.is_grad_enabled() and part is not None and part.requires_grad for part in student]
    outputs = _linear_kd(*parts, labels, *shares, temperature, alpha, kind, beta, *needed)
    return Terms(*outputs[:3])


def _share(counted: Tensor, dtype: torch.dtype) -> Tensor:
    """What each position adds to a mean over those that count."""
    return counted.to(dtype) / counted.sum().clamp(min=1)


@cache
def _has_triton() -> bool:
    """Whether Triton is installed, and the C compiler that it builds its launchers with."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return find_spec("triton") is not None and any(shutil.which(compiler) for compiler in compilers)


@torch.library.custom_op("qatkit::linear_kd", mutates_args=())  # opaque to torch.compile, so that it breaks no graph
def _linear_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    indices: Tensor | None,
    log_p: Tensor | None,
    labels: Tensor | None,
    share: Tensor,
    label_share: Tensor,
    temperature: float,
    alpha: float,
    kind: str,
    beta: float,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, divergence, cross-entropy, and the loss's gradients for the student's hidden states, weight and bias; empty
    where not asked for."""
    positions, classes = len(student_hidden), len(student_weight)
    exact = share.dtype
    device = "cpu" if student_hidden.device.type == "cpu" else "cuda"
    heads = [(student_hidden, student_weight, student_bias)]
    if teacher_hidden is not None and teacher_weight is not None:
        heads.append((teacher_hidden, teacher_weight, teacher_bias))
    rows = max(1, min(positions, WORKSPACE[device] // (len(heads) * classes * student_hidden.element_size())))
    rows -= rows % 256 if 256 < rows < positions else 0  # whole tiles of the matrix products
    block: Any  # both are called alike
    if student_hidden.is_cuda and teacher_hidden is not None and exact == torch.float32 and _has_triton():
        from qatkit.kernels.kd_rows_triton import RowKernel  # there is no Triton where there is no GPU

        block_rows = rows
        block = RowKernel(temperature, alpha, kind, beta, hidden_grad or weight_grad or bias_grad)
    else:
        block_rows = max(1, min(rows, CACHED[device] // classes))
        options = (temperature, alpha, DIVERGENCES[kind], beta)
        block = Block(block_rows, classes, exact, student_hidden.device, *options)
    sums = share.new_zeros(2)
    hidden_out = student_hidden.new_empty(student_hidden.shape if hidden_grad else 0)
    weight_out = sums.new_zeros(student_weight.shape if weight_grad else 0)
    bias_out = sums.new_zeros(classes if bias_grad else 0)
    biases = [None if bias is None else bias / temperature for *_, bias in heads]
    logits = [student_hidden.new_empty(rows, len(weight)) for _, weight, _ in heads]
    with torch.autocast(student_hidden.device.type, enabled=False):
        for start in range(0, positions, rows):
            part = slice(start, min(start + rows, positions))
            size = part.stop - part.start
            for out, (hidden, weight, _), bias in zip(logits, heads, biases, strict=True):
                scaled = out[:size] if bias is None else out[:size].copy_(bias)
                scaled.addmm_(hidden[part], weight.t(), beta=0 if bias is None else 1, alpha=1 / temperature)
            student = logits[0][:size]
            for first in range(0, size, block_rows):
                inner = slice(first, min(first + block_rows, size))
                outer = slice(start + inner.start, start + inner.stop)
                if indices is not None and log_p is not None:
                    target: Tensor | Best = (indices[outer], log_p[outer])
                else:
                    target = logits[1][inner]
                label = None if labels is None else labels[outer]
                sums += torch.stack(block(student[inner], target, label, share[outer], label_share[outer]))
            if hidden_grad:
                torch.mm(student, student_weight, out=hidden_out[part])
            if weight_grad and weight_out.dtype == student.dtype:
                weight_out.addmm_(student.t(), student_hidden[part])
            elif weight_grad and student_hidden.is_cuda:
                # the sum over the parts stays in float32, inside the product
                product = student.t(), student_hidden[part]
                torch.addmm(weight_out, *product, out_dtype=weight_out.dtype, out=weight_out)
            elif weight_grad:
                weight_out += student.t() @ student_hidden[part]
            if bias_grad:
                bias_out += student.sum(dim=0, dtype=exact)
    dtype = student_weight.dtype
    loss = alpha * sums[0] + (1 - alpha) * sums[1]
    return loss, sums[0].clone(), sums[1].clone(), hidden_out, weight_out.to(dtype), bias_out.to(dtype)


@_linear_kd.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, share, needed = args[0], args[1], args[9], args[-3:]
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    grads = [hidden.new_empty(shape if need else 0) for shape, need in zip(shapes, needed, strict=True)]
    values = [share.new_empty(()) for _ in range(3)]
    return values[0], values[1], values[2], grads[0], grads[1], grads[2]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # zeros for the gradients' own gradients would be as large as the weight
    # not save_for_backward: the backward pass must be the last owner, to scale and hand over without a copy
    ctx.grads = [part.detach() if need else None for part, need in zip(output[3:], inputs[-3:], strict=True)]


def _scale(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if ctx.grads is None:
        raise QatkitError("linear_kd_loss: backward was called twice; the first call used up the gradients. Sum losses")
    grads, ctx.grads = ctx.grads, None
    return (*(None if part is None else part.mul_(grad) for part in grads), *[None] * 15)


_linear_kd.register_autograd(_scale, setup_context=_keep)


def check_heads(student: Head, teacher: Head) -> None:
    """Raise unless the shapes fit each other.

    Raises:
        QatkitError: names them.
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
            f"linear_kd_loss: hidden states and weights have shapes {shapes[:2]} (student) and {shapes[2:]} (teacher); "
            "they must be [positions, width] and [classes, width] with equal positions and classes. Weights padded to "
            "different vocabularies are cut: weight[:vocab_size]"
        )

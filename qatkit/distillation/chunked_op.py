"""The custom operator behind `linear_kd_loss`: it computes rows of logits and gradients, and selects the kernel."""

from __future__ import annotations

import os
import shutil
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from qatkit.common.tables import implementation
from qatkit.distillation.divergences import DIVERGENCES
from qatkit.errors import QatkitError
from qatkit.kernels.kd_rows_torch import TopK, TorchRows

WORKSPACE = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Bytes for student and teacher logits together. More than 256 rows of 32,000 classes are not faster on the CPU."""
CACHED = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Number of logits per call of `TorchRows`, which passes over them about a dozen times, so they should fit in the CPU's
cache.
"""


@cache
def _has_triton() -> bool:
    """Whether Triton and the C compiler that builds its launchers are installed."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return find_spec("triton") is not None and any(shutil.which(compiler) for compiler in compilers)


@torch.library.custom_op("qatkit::linear_kd", mutates_args=())  # opaque to torch.compile, so that it breaks no graph
def linear_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    indices: Tensor | None,
    log_p: Tensor | None,
    labels: Tensor | None,
    weights: Tensor,
    label_weights: Tensor,
    temperature: float,
    alpha: float,
    kind: str,
    beta: float,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, its two terms, and its gradients for the student's hidden states, weight and bias."""
    positions, classes = len(student_hidden), len(student_weight)
    exact = weights.dtype
    # positions that neither loss includes get logits of 0: non-finite values times a weight of 0 would be NaN
    heads = [(student_hidden, student_weight, student_bias, (weights > 0) | (label_weights > 0))]
    if teacher_hidden is not None and teacher_weight is not None:
        heads.append((teacher_hidden, teacher_weight, teacher_bias, weights > 0))
    rows = max(
        1,
        min(positions, WORKSPACE[_memory_of(student_hidden)] // (len(heads) * classes * student_hidden.element_size())),
    )
    rows -= rows % 256 if 256 < rows < positions else 0  # whole tiles of the matrix products
    kernel_rows, kernel = _kernel(
        student_hidden, teacher_hidden, rows, classes, exact, temperature, alpha, kind, beta,
        hidden_grad or weight_grad or bias_grad,
    )  # fmt: skip
    sums = weights.new_zeros(2)
    hidden_out = student_hidden.new_empty(student_hidden.shape if hidden_grad else 0)
    weight_out = sums.new_zeros(student_weight.shape if weight_grad else 0)
    bias_out = sums.new_zeros(classes if bias_grad else 0)
    biases = [None if bias is None else bias / temperature for _, _, bias, _ in heads]
    logits = [student_hidden.new_empty(rows, len(weight)) for _, weight, _, _ in heads]
    with torch.autocast(student_hidden.device.type, enabled=False):
        for start in range(0, positions, rows):
            part = slice(start, min(start + rows, positions))
            size = part.stop - part.start
            inputs = [torch.where(counted[part].unsqueeze(1), hidden[part], 0) for hidden, _, _, counted in heads]
            for out, hidden, (_, weight, _, counted), bias in zip(logits, inputs, heads, biases, strict=True):
                scaled = out[:size] if bias is None else out[:size].copy_(bias)
                if bias is not None:
                    scaled.masked_fill_(~counted[part].unsqueeze(1), 0)  # a bias may be -inf
                scaled.addmm_(hidden, weight.t(), beta=0 if bias is None else 1, alpha=1 / temperature)
            student = logits[0][:size]
            for first in range(0, size, kernel_rows):
                inner = slice(first, min(first + kernel_rows, size))
                outer = slice(start + inner.start, start + inner.stop)
                if indices is not None and log_p is not None:
                    target: Tensor | TopK = (indices[outer], log_p[outer])
                else:
                    target = logits[1][inner]
                label = None if labels is None else labels[outer]
                sums += torch.stack(kernel(student[inner], target, label, weights[outer], label_weights[outer]))
            if hidden_grad:
                torch.mm(student, student_weight, out=hidden_out[part])
            if weight_grad and weight_out.dtype == student.dtype:
                weight_out.addmm_(student.t(), inputs[0])
            elif weight_grad and student_hidden.is_cuda:
                # the sum over the parts stays in float32, inside the product
                torch.addmm(weight_out, student.t(), inputs[0], out_dtype=weight_out.dtype, out=weight_out)
            elif weight_grad:
                weight_out += student.t() @ inputs[0]
            if bias_grad:
                bias_out += student.sum(dim=0, dtype=exact)
    dtype = student_weight.dtype
    loss = alpha * sums[0] + (1 - alpha) * sums[1]
    return loss, sums[0].clone(), sums[1].clone(), hidden_out, weight_out.to(dtype), bias_out.to(dtype)


def _memory_of(tensor: Tensor) -> str:
    """Which entry of `WORKSPACE` and `CACHED` applies to a tensor."""
    return "cpu" if tensor.device.type == "cpu" else "cuda"


def _kernel(
    student_hidden: Tensor, teacher_hidden: Tensor | None, rows: int, classes: int, exact: torch.dtype,
    temperature: float, alpha: float, kind: str, beta: float, gradient: bool,
) -> tuple[int, Any]:  # fmt: skip
    """Rows per call, and the row kernel: Triton's where it applies, else the torch reference."""
    row = DIVERGENCES[kind]
    if (
        student_hidden.is_cuda
        and teacher_hidden is not None
        and exact == torch.float32
        and row.triton
        and _has_triton()
    ):
        from qatkit.kernels.kd_rows_triton import TritonRows  # Triton is installed with CUDA only

        return rows, TritonRows(temperature, alpha, kind, beta, gradient)
    kernel_rows = max(1, min(rows, CACHED[_memory_of(student_hidden)] // classes))
    divergence = None if teacher_hidden is None else implementation(row.rows)
    top_k = implementation(row.top_k_rows) if teacher_hidden is None else None
    device = student_hidden.device
    return kernel_rows, TorchRows(kernel_rows, classes, exact, device, temperature, alpha, divergence, top_k, beta)


@linear_kd.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, weights, needed = args[0], args[1], args[9], args[-3:]
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    grads = [hidden.new_empty(shape if need else 0) for shape, need in zip(shapes, needed, strict=True)]
    values = [weights.new_empty(()) for _ in range(3)]
    return values[0], values[1], values[2], grads[0], grads[1], grads[2]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # zeros for the gradients' own gradients would be as large as the weight
    # not save_for_backward: the backward pass must be the last owner, to scale and hand over without a copy
    ctx.grads = [part.detach() if need else None for part, need in zip(output[3:], inputs[-3:], strict=True)]


def _scale(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if ctx.grads is None:
        raise QatkitError(
            "backward was called twice, and the first call consumed the gradients",
            key="linear_kd_loss",
            advice="sum the losses and call backward once",
        )
    grads, ctx.grads = ctx.grads, None
    return (*(None if part is None else part.mul_(grad) for part in grads), *[None] * 15)


linear_kd.register_autograd(_scale, setup_context=_keep)

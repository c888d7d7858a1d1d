"""A Triton kernel with the computation of `qatkit.kernels.kd_rows_torch` for GPUs.

Eager torch passes over the logits of a row about a dozen times, in float32. The kernel moves less data. It reads both
rows for their maxima and sums (twice for the Jensen-Shannon divergence), reads them again, and writes one row, all in
the dtype of the logits. On a GPU, memory traffic determines whether the loss takes longer than its matrix products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = ("kl", "reverse_kl", "jsd")
"""The divergences that the kernel implements."""

# compiled functions take pointers and blocks, which have no Python types


@triton.jit
def _shifted(values, top, shared):  # type: ignore[no-untyped-def]
    return tl.where(shared, tl.exp(values - top), 0.0)


@triton.jit
def _over_mixture(log_p, log_q, beta):  # type: ignore[no-untyped-def]
    """``log p - log m`` and ``log q - log m`` with ``m = beta * p + (1 - beta) * q``, only from the ratio of p and q.

    Beyond a ratio of e^80 the smaller of the two is lost in a sum, and the exponential would overflow.
    """
    ratio = tl.minimum(tl.maximum(log_p - log_q, -80.0), 80.0)
    of_q = -tl.log(beta * tl.exp(ratio) + (1 - beta))
    return of_q + ratio, of_q


@triton.jit  # type: ignore[untyped-decorator]
def _rows(  # type: ignore[no-untyped-def]
    student, teacher, labels, weights, label_weights, divergence, cross_entropy, student_stride, teacher_stride,
    classes, narrow, temperature, alpha, beta,
    KIND: tl.constexpr, LABELS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row per program; `TritonRows` describes the arguments."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    low = -1e30  # not -inf: the difference of two would be NaN
    s_top, t_top = tl.full([BLOCK], low, tl.float32), tl.full([BLOCK], low, tl.float32)
    s_sum, t_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    hard_sum, dot = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    label = 0
    target = 0.0
    # every value is read before any thread may write: the reductions below are a barrier
    if LABELS:
        label = tl.load(labels + row)
        # an invalid label gives a loss of NaN
        target = tl.load(student + label, mask=label < classes, other=float("nan")).to(tl.float32)
    # a common offset of the logits would reduce the precision of their differences: subtract a large logit of each row
    some = tl.arange(0, BLOCK)
    s_shift = tl.max(tl.load(student + some, mask=some < narrow, other=float("-inf")).to(tl.float32), 0)
    t_shift = tl.max(tl.load(teacher + some, mask=some < narrow, other=float("-inf")).to(tl.float32), 0)
    # every lane has its own maximum, so that nothing is reduced within the loop
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        shared = columns < narrow
        s = tl.load(student + columns, mask=columns < classes, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher + columns, mask=shared, other=float("-inf")).to(tl.float32)
        s_new, t_new = tl.maximum(s_top, s), tl.maximum(t_top, t)
        s_fade, t_fade = tl.exp(s_top - s_new), tl.exp(t_top - t_new)
        q, p = _shifted(s, s_new, shared), _shifted(t, t_new, shared)
        s_sum, t_sum = s_sum * s_fade + q, t_sum * t_fade + p
        if LABELS:
            hard = tl.where(columns < classes, tl.exp(temperature * (s - s_new)), 0.0)
            hard_sum = hard_sum * tl.exp(temperature * (s_top - s_new)) + hard
        if KIND == "kl":
            dot = dot * t_fade + tl.where(shared, p * ((t - t_shift) - (s - s_shift)), 0.0)
        if KIND == "reverse_kl":
            dot = dot * s_fade + tl.where(shared, q * ((s - s_shift) - (t - t_shift)), 0.0)
        s_top, t_top = s_new, t_new
    s_peak, t_peak = tl.max(s_top, 0), tl.max(t_top, 0)
    s_fade, t_fade = tl.exp(s_top - s_peak), tl.exp(t_top - t_peak)
    s_total, t_total = tl.sum(s_sum * s_fade, 0), tl.sum(t_sum * t_fade, 0)
    s_log, t_log = s_peak + tl.log(s_total), t_peak + tl.log(t_total)
    hard_total = 1.0
    mean = 0.0
    if LABELS:
        hard_total = tl.sum(hard_sum * tl.exp(temperature * (s_top - s_peak)), 0)
        tl.store(cross_entropy + row, tl.log(hard_total) - temperature * (target - s_peak))
    if KIND == "kl":
        tl.store(divergence + row, tl.sum(dot * t_fade, 0) / t_total + ((s_log - s_shift) - (t_log - t_shift)))
    if KIND == "reverse_kl":
        mean = tl.sum(dot * s_fade, 0) / s_total - ((s_log - s_shift) - (t_log - t_shift))
        tl.store(divergence + row, mean)
    if KIND == "jsd":
        of_p, of_q = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            shared = columns < narrow
            log_q = tl.load(student + columns, mask=shared, other=0.0).to(tl.float32) - s_log
            log_p = tl.load(teacher + columns, mask=shared, other=0.0).to(tl.float32) - t_log
            p_over_m, q_over_m = _over_mixture(log_p, log_q, beta)
            of_p += tl.where(shared, tl.exp(log_p) * p_over_m, 0.0)
            of_q += tl.where(shared, tl.exp(log_q) * q_over_m, 0.0)
        mean = tl.sum(of_q, 0)
        tl.store(divergence + row, beta * tl.sum(of_p, 0) + (1 - beta) * mean)
    if GRADIENT:
        weight = tl.load(weights + row) * alpha * temperature
        hard_weight = tl.load(label_weights + row) * (1 - alpha)
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            shared = columns < narrow
            s = tl.load(student + columns, mask=columns < classes, other=0.0).to(tl.float32)
            log_q = s - s_log
            log_p = tl.load(teacher + columns, mask=shared, other=0.0).to(tl.float32) - t_log
            if KIND == "kl":
                slope = tl.exp(log_q) - tl.exp(log_p)
            elif KIND == "reverse_kl":
                slope = tl.exp(log_q) * (log_q - log_p - mean)
            elif KIND == "jsd":
                _, q_over_m = _over_mixture(log_p, log_q, beta)
                slope = (1 - beta) * tl.exp(log_q) * (q_over_m - mean)
            slope = tl.where(shared, weight * slope, 0.0)
            if LABELS:
                slope += hard_weight / hard_total * tl.exp(temperature * (s - s_peak))
                slope -= tl.where(columns == label, hard_weight, 0.0)
            tl.store(student + columns, slope, mask=columns < classes)


class TritonRows:
    """The fast path of `qatkit.kernels.kd_rows_torch.TorchRows` on CUDA, for full logits in float32 or narrower.

    Args:
        temperature: Temperature by which the logits have already been divided.
        alpha: Weight of the divergence; cross-entropy has weight ``1 - alpha``.
        kind: One of `KINDS`.
        beta: Mixture weight of "jsd".
        gradient: Whether to overwrite the student's logits with the gradient; otherwise they are not changed.
    """

    def __init__(self, temperature: float, alpha: float, kind: str, beta: float, gradient: bool) -> None:
        assert kind in KINDS, kind
        self.temperature = temperature
        self.alpha = alpha
        self.kind = kind
        self.beta = beta
        self.gradient = gradient

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None, weights: Tensor, label_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Divergence and cross-entropy of these rows, as `TorchRows` returns them; the teacher's logits are kept."""
        rows, classes = student.shape
        divergence, cross_entropy = weights.new_zeros(2, rows)
        # 16 bytes of each row per thread and iteration; with fewer classes than lanes the other lanes are idle
        block = min(2048, triton.next_power_of_2(classes))
        # Triton launches on the current GPU; torch has no types for device_of
        with torch.cuda.device_of(student):  # type: ignore[no-untyped-call]
            _rows[(rows,)](
                student, teacher, labels, weights, label_weights, divergence, cross_entropy,
                student.stride(0), teacher.stride(0), classes, teacher.shape[1],
                self.temperature, self.alpha, self.beta,
                KIND=self.kind, LABELS=labels is not None, GRADIENT=self.gradient, BLOCK=block, num_warps=8,
            )  # fmt: skip
        return torch.dot(weights, divergence) * self.temperature**2, torch.dot(label_weights, cross_entropy)

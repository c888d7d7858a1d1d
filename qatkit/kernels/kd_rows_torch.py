"""In-place loss and gradient of a few rows of logits: the torch reference of `linear_kd_loss`, for any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RowDivergence = Callable[[Tensor, Tensor, list[Tensor], float], Tensor]
"""Takes the scaled logits of student and teacher ``[rows, classes]``, each with a maximum of 0, scratch tensors of the
same shape, and beta. Returns the divergence of each row ``[rows, 1]`` and overwrites the teacher's logits with its
gradient with respect to the student's scaled logits.
"""

TopK = tuple[Tensor, Tensor]
"""A teacher's top-k classes, int64 ``[rows, k]``, and the normalized log-probabilities ``[rows, k + 1]`` of these
classes and of all others combined.
"""

TopKDivergence = Callable[[Tensor, TopK, Tensor], tuple[Tensor, Tensor]]
"""Takes the student's scaled logits, a teacher's top-k classes and one scratch tensor. Returns the divergence of each
row ``[rows, 1]`` and its gradient with respect to the student's scaled logits."""


class TorchRows:
    """Replaces rows of logits with their gradient, with scratch memory shared by all calls.

    Args:
        rows: The largest number of rows in one call.
        classes: Number of classes.
        dtype: Dtype of the computation; logits in a different dtype are converted row by row.
        device: Device of the logits.
        temperature: Temperature by which the logits have already been divided.
        alpha: Weight of the divergence; cross-entropy has weight ``1 - alpha``.
        divergence: Computes the divergence from full logits; None if every call passes top-k classes.
        top_k_divergence: Computes the divergence from top-k classes; None if no call passes top-k classes.
        beta: Mixture weight of the divergence.
    """

    def __init__(
        self,
        rows: int,
        classes: int,
        dtype: torch.dtype,
        device: torch.device,
        temperature: float,
        alpha: float,
        divergence: RowDivergence | None,
        top_k_divergence: TopKDivergence | None,
        beta: float,
    ) -> None:
        self.scratch = torch.empty(5, rows, classes, dtype=dtype, device=device)
        self.temperature = temperature
        self.alpha = alpha
        self.divergence = divergence
        self.top_k_divergence = top_k_divergence
        self.beta = beta

    def __call__(
        self, student: Tensor, teacher: Tensor | TopK, labels: Tensor | None, weights: Tensor, label_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Divergence and cross-entropy of these rows; the student's logits are overwritten with the loss's gradient.

        Args:
            student: Logits over the temperature ``[rows, classes]``, overwritten.
            teacher: Logits over the temperature, overwritten; ``[rows, fewer]`` if the student has padding classes
                after those of the teacher. Or the teacher's top-k classes.
            labels: Class indices ``[rows]``, valid ones wherever `label_weights` is above 0.
            weights: Weight of each row in the divergence ``[rows]``, in the dtype of the computation.
            label_weights: Weight of each row in the cross-entropy ``[rows]``.
        """
        scratch = list(self.scratch[:, : len(student)])
        weights = weights.unsqueeze(1)  # [rows, 1], like every value per row below
        exact = student.dtype == self.scratch.dtype
        s = student if exact else scratch[3].copy_(student)
        s -= s.amax(dim=1, keepdim=True)
        if isinstance(teacher, Tensor):
            assert self.divergence is not None
            narrow = teacher.shape[1]
            t = teacher if exact else scratch[4][:, :narrow].copy_(teacher)
            t -= t.amax(dim=1, keepdim=True)
            divergence = self.divergence(s[:, :narrow], t, [part[:, :narrow] for part in scratch], self.beta)
        else:
            assert self.top_k_divergence is not None
            narrow = s.shape[1]
            divergence, t = self.top_k_divergence(s, teacher, scratch[0])
        soft = (weights * divergence).sum() * self.temperature**2
        slopes = weights * (self.alpha * self.temperature)
        if labels is None:
            cross_entropy = torch.zeros_like(soft)
            torch.mul(t, slopes, out=s[:, :narrow])
            s[:, narrow:] = 0
        else:
            s *= self.temperature
            target = s.gather(1, labels.unsqueeze(1))
            total = s.exp_().sum(dim=1, keepdim=True)
            label_weights = label_weights.unsqueeze(1)
            cross_entropy = (label_weights * (total.log() - target)).sum()
            hard = label_weights * (1 - self.alpha)
            s *= hard / total
            s.scatter_add_(1, labels.unsqueeze(1), -hard)
            s[:, :narrow].addcmul_(t, slopes)
        if not exact:
            student.copy_(s)
        return soft, cross_entropy


def kl_rows(s: Tensor, t: Tensor, scratch: list[Tensor], beta: float) -> Tensor:
    """``sum(p * (log p - log q))``, gradient ``q - p``; see `RowDivergence`."""
    p = torch.exp(t, out=scratch[0])
    p_total = p.sum(dim=1, keepdim=True)
    value = _dot(p, t.sub_(s)) / p_total - p_total.log()
    q = torch.exp(s, out=t)
    q_total = q.sum(dim=1, keepdim=True)
    q.div_(q_total).addcmul_(p, p_total.reciprocal().neg_())
    return value + q_total.log()


def reverse_kl_rows(s: Tensor, t: Tensor, scratch: list[Tensor], beta: float) -> Tensor:
    """``sum(q * (log q - log p))``, gradient ``q * (log q - log p - value)``; see `RowDivergence`."""
    q = torch.exp(s, out=scratch[0])
    q_total = q.sum(dim=1, keepdim=True)
    p_total = torch.exp(t, out=scratch[1]).sum(dim=1, keepdim=True)
    q /= q_total
    ratio = torch.sub(s, t, out=t)
    mean = _dot(q, ratio)
    ratio.sub_(mean).mul_(q)
    return mean - q_total.log() + p_total.log()


def jsd_rows(s: Tensor, t: Tensor, scratch: list[Tensor], beta: float) -> Tensor:
    """With ``m = beta * p + (1 - beta) * q``: gradient ``(1 - beta) * q * (log q - log m - KL(q || m))``."""
    p, q = torch.exp(t, out=scratch[0]), torch.exp(s, out=scratch[1])
    p_total, q_total = p.sum(dim=1, keepdim=True), q.sum(dim=1, keepdim=True)
    p /= p_total
    q /= q_total
    # where both are 0 the logarithm must stay finite: 0 times it is 0
    log_m = torch.lerp(q, p, beta, out=scratch[2]).clamp_(min=torch.finfo(p.dtype).tiny).log_()
    teacher = _dot(p, t.sub_(log_m)) - p_total.log()
    ratio = torch.sub(s, log_m, out=t)
    mean = _dot(q, ratio)
    ratio.sub_(mean).mul_(q).mul_(1 - beta)
    return beta * teacher + (1 - beta) * (mean - q_total.log())


def top_k_kl_rows(s: Tensor, top_k: TopK, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """KL over k classes and the merged tail; gradient ``q - p``, distributed over the tail in proportion to q."""
    indices, log_p = top_k
    q = torch.exp(s, out=scratch)
    total = q.sum(dim=1, keepdim=True)
    top = q.gather(1, indices)
    # summed over the tail: 1 minus the top k would round to 0
    rest = q.scatter_(1, indices, 0).sum(dim=1, keepdim=True).clamp_(min=torch.finfo(q.dtype).tiny)
    log_q = torch.cat([s.gather(1, indices), rest.log()], dim=1) - total.log()
    p = log_p.exp()
    gradient = q.mul_(1 / total - p[:, -1:] / rest)
    gradient.scatter_(1, indices, top / total - p[:, :-1])
    return _dot(p, log_p - log_q), gradient


def _dot(a: Tensor, b: Tensor) -> Tensor:
    products: Tensor = torch.linalg.vecdot(a, b)
    return products.unsqueeze(1)

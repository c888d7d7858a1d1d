"""Loss and gradient of a few rows of logits, in place: the arithmetic of `linear_kd_loss`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor, list[Tensor], float], Tensor]
"""Takes the scaled logits of student and teacher ``[rows, classes]``, each with a maximum of 0, scratch of that shape
and beta; returns the divergence of every row ``[rows, 1]`` and leaves its gradient for the student's scaled logits in
the place of the teacher's."""

Best = tuple[Tensor, Tensor]
"""A teacher's best classes, int64 ``[rows, k]``, and the log-probabilities ``[rows, k + 1]`` of these and of all
others together, normalised."""


class Block:
    """Turns rows of logits into their gradient, with scratch memory that all calls share.

    Args:
        rows: The most rows of one call.
        classes: How many classes.
        dtype: Of the arithmetic; logits in another are converted row by row.
        device: Where the logits are.
        temperature: The logits come divided by it.
        alpha: Weight of the divergence; cross-entropy gets the rest.
        divergence: One of `DIVERGENCES`.
        beta: For the divergence.
    """

    def __init__(
        self,
        rows: int,
        classes: int,
        dtype: torch.dtype,
        device: torch.device,
        temperature: float,
        alpha: float,
        divergence: Divergence,
        beta: float,
    ) -> None:
        self.scratch = torch.empty(5, rows, classes, dtype=dtype, device=device)
        self.temperature = temperature
        self.alpha = alpha
        self.divergence = divergence
        self.beta = beta

    def __call__(
        self, student: Tensor, teacher: Tensor | Best, labels: Tensor | None, share: Tensor, label_share: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Divergence and cross-entropy of these rows; the gradient of the loss takes the place of the student's logits.

        Args:
            student: Logits over the temperature ``[rows, classes]``, overwritten.
            teacher: The same of the teacher, overwritten; ``[rows, fewer]`` where the student has padding classes
                behind those of the teacher. Or its best classes.
            labels: Class numbers ``[rows]``, valid ones wherever `label_share` is above 0.
            share: Weight of each row in the divergence ``[rows]``, in the dtype of the arithmetic.
            label_share: The same in the cross-entropy.
        """
        scratch = list(self.scratch[:, : len(student)])
        share = share.unsqueeze(1)  # [rows, 1], as everything below that is one per row
        exact = student.dtype == self.scratch.dtype
        s = student if exact else scratch[3].copy_(student)
        s -= s.amax(dim=1, keepdim=True)
        if isinstance(teacher, Tensor):
            narrow = teacher.shape[1]
            t = teacher if exact else scratch[4][:, :narrow].copy_(teacher)
            t -= t.amax(dim=1, keepdim=True)
            divergence = self.divergence(s[:, :narrow], t, [part[:, :narrow] for part in scratch], self.beta)
        else:
            narrow = s.shape[1]
            divergence, t = _best_kl(s, teacher, scratch[0])
        soft = (share * divergence).sum() * self.temperature**2
        weight = share * (self.alpha * self.temperature)
        if labels is None:
            cross_entropy = torch.zeros_like(soft)
            torch.mul(t, weight, out=s[:, :narrow])
            s[:, narrow:] = 0
        else:
            s *= self.temperature
            target = s.gather(1, labels.unsqueeze(1))
            total = s.exp_().sum(dim=1, keepdim=True)
            label_share = label_share.unsqueeze(1)
            cross_entropy = (label_share * (total.log() - target)).sum()
            hard = label_share * (1 - self.alpha)
            s *= hard / total
            s.scatter_add_(1, labels.unsqueeze(1), -hard)
            s[:, :narrow].addcmul_(t, weight)
        if not exact:
            student.copy_(s)
        return soft, cross_entropy


def _kl(s: Tensor, t: Tensor, scratch: list[Tensor], beta: float) -> Tensor:
    """``sum(p * (log p - log q))``, gradient ``q - p``."""
    p = torch.exp(t, out=scratch[0])
    p_total = p.sum(dim=1, keepdim=True)
    value = _dot(p, t.sub_(s)) / p_total - p_total.log()
    q = torch.exp(s, out=t)
    q_total = q.sum(dim=1, keepdim=True)
    q.div_(q_total).addcmul_(p, p_total.reciprocal().neg_())
    return value + q_total.log()


def _reverse_kl(s: Tensor, t: Tensor, scratch: list[Tensor], beta: float) -> Tensor:
    """``sum(q * (log q - log p))``, gradient ``q * (log q - log p - value)``."""
    q = torch.exp(s, out=scratch[0])
    q_total = q.sum(dim=1, keepdim=True)
    p_total = torch.exp(t, out=scratch[1]).sum(dim=1, keepdim=True)
    q /= q_total
    ratio = torch.sub(s, t, out=t)
    mean = _dot(q, ratio)
    ratio.sub_(mean).mul_(q)
    return mean - q_total.log() + p_total.log()


def _jsd(s: Tensor, t: Tensor, scratch: list[Tensor], beta: float) -> Tensor:
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


def _best_kl(s: Tensor, best: Best, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """KL over k classes and the rest as one more; gradient ``q - p`` of these, shared out in the rest as q is."""
    indices, log_p = best
    q = torch.exp(s, out=scratch)
    total = q.sum(dim=1, keepdim=True)
    top = q.gather(1, indices)
    # a sum of what is there, as 1 minus the best would round to 0
    rest = q.scatter_(1, indices, 0).sum(dim=1, keepdim=True).clamp_(min=torch.finfo(q.dtype).tiny)
    log_q = torch.cat([s.gather(1, indices), rest.log()], dim=1) - total.log()
    p = log_p.exp()
    gradient = q.mul_(1 / total - p[:, -1:] / rest)
    gradient.scatter_(1, indices, top / total - p[:, :-1])
    return _dot(p, log_p - log_q), gradient


def _dot(a: Tensor, b: Tensor) -> Tensor:
    products: Tensor = torch.linalg.vecdot(a, b)
    return products.unsqueeze(1)


DIVERGENCES: dict[str, Divergence] = {"kl": _kl, "reverse_kl": _reverse_kl, "jsd": _jsd}

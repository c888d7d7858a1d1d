"""Text loss as a mean over all tokens of an optimizer step, across batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class TokenWeighting:
    """Converts per-batch mean losses to the mean over all tokens of an optimizer step.

    Lightning averages the losses of accumulated batches and the gradients of processes as if all batches had the same
    number of labels. Each batch's loss is therefore multiplied by its number of labels and divided by a reference,
    which is the mean number of labels in the first batch of the step over all processes. With accumulation, the true
    mean is known only at the end of the step, when the gradients are corrected by the number of labels in the batches.
    On one process without accumulation, every weight is 1.
    """

    def __init__(self) -> None:
        self._weight: Tensor | None = None
        self._reference: Tensor | None = None
        self._seen: Tensor | None = None

    def add(self, count: Tensor, first: bool, mean: Callable[[Tensor], Tensor]) -> None:
        """Add a batch before its backward pass.

        Args:
            count: Number of labels in the batch other than -100, a 0-d tensor.
            first: Whether the batch is the first of an optimizer step.
            mean: Returns the mean of a tensor over all processes.
        """
        count = count.float()
        if first or self._reference is None or self._seen is None:
            self._reference = mean(count.clone()).clamp(min=1)
            self._seen = torch.zeros_like(count)
        self._seen = self._seen + count
        self._weight = count / self._reference

    def weighted(self, loss: Tensor) -> Tensor:
        """Weight the loss of the last added batch; other losses are returned unchanged."""
        weight, self._weight = self._weight, None
        return loss if weight is None else loss * weight

    @torch.no_grad()
    def correct(self, parameters: Iterable[nn.Parameter], batches: int, mean: Callable[[Tensor], Tensor]) -> None:
        """Correct the gradients by the step's number of labels, before the optimizer step.

        Args:
            parameters: The trained parameters; Lightning has divided their gradients by `batches`.
            batches: Batches per optimizer step; the last step of an epoch may have fewer.
            mean: Returns the mean of a tensor over all processes.
        """
        if self._reference is None or self._seen is None:
            return
        factor = batches * self._reference / mean(self._seen).clamp(min=1)
        for parameter in parameters:
            if (grad := parameter.grad) is not None:
                local = grad.to_local() if isinstance(grad, DTensor) else grad
                local.mul_(factor)
        self._reference = self._seen = None

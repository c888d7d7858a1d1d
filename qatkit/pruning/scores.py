"""Importance scores for individual weights as pure functions: Wanda, Taylor and movement."""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.pruning.masks import check_sparsity


def wanda_scores(weight: Tensor, input_norm: Tensor) -> Tensor:
    """Score each weight by its magnitude times the norm of its input: ``|w[i, j]| * ||x[:, j]||``.

    This is equation 1 of Sun et al. (2023, https://arxiv.org/abs/2306.11695). Compare scores within each output, as
    `row_mask` does.

    Args:
        weight: ``[out, in]``.
        input_norm: L2 norm of every input over all tokens, ``[in]``.

    Returns:
        Non-negative scores in the weight's shape, float32.

    Example:
        >>> import torch
        >>> wanda_scores(torch.tensor([[1.0, -2.0]]), torch.tensor([3.0, 0.5]))
        tensor([[3., 1.]])
    """
    return weight.detach().float().abs() * input_norm.float()


def taylor_scores(weight: Tensor, gradient: Tensor) -> Tensor:
    """Score each weight by the squared first-order change of the loss if it becomes 0: ``(w * g) ** 2``.

    This is equation 8 of Molchanov et al. (2019, https://arxiv.org/abs/1906.10771) for single weights.

    Args:
        weight: Any shape.
        gradient: Gradient of the loss with respect to the weight, for one batch or averaged over multiple batches.

    Returns:
        Non-negative scores in the weight's shape, float32.
    """
    return (weight.detach().float() * gradient.float()).square()


@torch.no_grad()
def add_movement(scores: Tensor, weight: Tensor, gradient: Tensor) -> None:
    """Update movement scores in place with one step: ``scores -= w * g``, which is high where weights move away from 0.

    See section 4 of Sanh, Wolf and Rush (2020, https://arxiv.org/abs/2005.07683). Compare these scores by value, with
    ``lowest(..., signed=True)``.

    Args:
        scores: Accumulated scores, float32, in the weight's shape.
        weight: The weight before the step.
        gradient: Gradient of the loss with respect to the weight.
    """
    scores.addcmul_(weight.float(), gradient.float(), value=-1)


def row_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Prune the ``round(sparsity * in)`` lowest scores of every output; of equal scores, the first is pruned first.

    Args:
        scores: ``[out, in]``.
        sparsity: Fraction of pruned weights in each row, from 0 to below 1.

    Returns:
        The mask, bool: False where pruned.

    Raises:
        QatkitError: the sparsity is out of range or prunes whole rows.

    Example:
        >>> import torch
        >>> row_mask(torch.tensor([[1.0, 2.0], [8.0, 4.0]]), 0.5)
        tensor([[False,  True],
                [ True, False]])
    """
    check_sparsity("sparsity", sparsity)
    count = round(sparsity * scores.shape[1])
    if count == scores.shape[1]:
        raise QatkitError(
            f"{sparsity} prunes all {count} inputs of every output", key="sparsity", advice="use a lower fraction"
        )
    lowest = scores.sort(dim=1, stable=True).indices[:, :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, lowest, False)

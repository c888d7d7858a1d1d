"""SparseGPT: prune one layer in one shot and update the kept weights to compensate."""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.pruning.masks import check_nm, check_sparsity, nm_mask
from qatkit.pruning.selection import lowest

BLOCK = 128
"""Columns per block: the mask of a block is chosen at once, and the columns after it are updated once."""


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
    damp: float = 0.01,
) -> Tensor:
    """Prune a weight column by column, minimizing the squared error of the layer's output.

    This is algorithm 1 of Frantar and Alistarh (2023, https://arxiv.org/abs/2301.00774). With ``inverse(X.T @ X) = U.T
    @ U``, pruning a weight ``w`` in column ``j`` costs ``w ** 2 / U[j, j] ** 2``, and the columns after it change by
    ``-w / U[j, j] * U[j, :]``. Existing zeros count towards the sparsity and stay zero.

    Args:
        weight: ``[out, in]``.
        gram: ``X.T @ X`` over the layer's inputs, ``[in, in]``; its dtype, float32 or float64, is used throughout.
        sparsity: Fraction of pruned weights, exact over the whole weight. Set exactly one of `sparsity` and `nm`.
        nm: ``(N, M)`` keeps N of every M consecutive inputs.
        damp: Added to the diagonal of `gram`, as a fraction of its mean.

    Returns:
        The pruned weight, in the dtype of `weight`.

    Raises:
        QatkitError: the sparsity or the pattern is invalid, or the inputs are non-finite.

    Example:
        >>> import torch
        >>> x, weight = torch.eye(4), torch.tensor([[0.1, -3.0, 2.0, -0.2]])
        >>> sparsegpt(weight, x.t() @ x, nm=(2, 4))
        tensor([[ 0., -3.,  2.,  0.]])
    """
    if nm is not None:
        check_nm("weight", weight, *nm)
    else:
        check_sparsity("sparsity", sparsity if sparsity is not None else -1.0)
    upper, unused = _inverse_root(gram, damp)
    pruned = weight.detach().to(upper.dtype, copy=True)
    zeros = pruned == 0
    before = zeros if zeros.any() else None
    rows, columns = pruned.shape
    size = BLOCK if nm is None else max(BLOCK - BLOCK % nm[1], nm[1])  # no group spans two blocks
    done = 0
    for start in range(0, columns, size):
        end = min(start + size, columns)
        block, root = pruned[:, start:end], upper[start:end, start:end]
        mask = torch.ones_like(block, dtype=torch.bool)
        if nm is None:
            # the rounded count up to this column, minus the weights already pruned: exact over all blocks
            scores = _scores(block, root.diagonal(), unused[start:end])
            old = zeros[:, start:end]
            count = max(round((sparsity or 0.0) * rows * end) - done, int(old.sum()))
            done += count
            scores[old] = -1.0
            mask = lowest({"weight": scores}, count, signed=True)["weight"] if count < scores.numel() else ~mask
        errors = torch.zeros_like(block)
        for j in range(end - start):
            if nm is not None and j % nm[1] == 0:
                group = slice(j, j + nm[1])
                scores = _scores(block[:, group], root.diagonal()[group], unused[start:end][group])
                mask[:, group] = nm_mask(scores, *nm)
            column = block[:, j].clone()
            errors[:, j] = (column * ~mask[:, j]) / root[j, j]
            block[:, j:] -= errors[:, j : j + 1] * root[j, j:]
            if before is not None:
                block.masked_fill_(before[:, start:end], 0)
            block[:, j] = torch.where(mask[:, j], column, 0)
        pruned[:, end:] -= errors @ upper[start:end, end:]
        if before is not None:
            pruned.masked_fill_(before, 0)
    return pruned.to(weight.dtype)


def _scores(weight: Tensor, root: Tensor, unused: Tensor) -> Tensor:
    # pruning a weight whose input is always 0 costs nothing
    return torch.where(unused, 0.0, (weight / root).square()).float()


def _inverse_root(gram: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Compute ``U`` with ``U.T @ U = inverse(damped gram)``, and the mask of inputs that are always 0."""
    gram = gram.detach().clone()
    if not gram.isfinite().all():
        raise QatkitError("the inputs of the layer are non-finite", key="gram", advice="use other calibration batches")
    diagonal = gram.diagonal()
    unused = diagonal == 0
    diagonal += damp * diagonal.mean()
    diagonal[unused] += 1
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True), unused

"""SparseGPT: prune one layer at once and let the weights that stay make up for it."""

from __future__ import annotations

import torch
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.pruning.masks import check_nm, check_sparsity, nm_mask
from qatkit.pruning.selection import lowest

BLOCK = 128
"""Columns whose mask is chosen together, and that are updated before the rest of the weight is."""


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
    damp: float = 0.01,
) -> Tensor:
    """Prune a weight for the least squared error of the layer's output, column by column.

    Frantar and Alistarh (2023, https://arxiv.org/abs/2301.00774), algorithm 1. With ``inverse(X.T @ X) = U.T @ U``, the
    weight in column ``j`` costs ``w ** 2 / U[j, j] ** 2``; when it becomes 0, the columns behind it change by ``-w /
    U[j, j] * U[j, :]``. Zeros that are there before are among those that are pruned, and stay.

    Args:
        weight: ``[out, in]``.
        gram: ``X.T @ X`` over the layer's inputs, ``[in, in]``, float32 or float64, which is what it is computed in.
        sparsity: Share of zeros, exact over the weight; give it or `nm`.
        nm: ``(N, M)`` keeps N of every M neighbouring inputs.
        damp: Added to the diagonal, as a share of its mean.

    Returns:
        The pruned weight, in the dtype of `weight`.

    Raises:
        QatkitError: the sparsity or the pattern is out of range, or the inputs are not finite.
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
    size = BLOCK if nm is None else max(BLOCK - BLOCK % nm[1], nm[1])  # no group on two blocks
    done = 0
    for start in range(0, columns, size):
        end = min(start + size, columns)
        block, root = pruned[:, start:end], upper[start:end, start:end]
        mask = torch.ones_like(block, dtype=torch.bool)
        if nm is None:
            # the rounded total up to here less what is done: over all blocks the count is exact
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
    # what multiplies inputs that are always 0 costs nothing
    return torch.where(unused, 0.0, (weight / root).square()).float()


def _inverse_root(gram: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """``U`` with ``U.T @ U`` the inverse of the damped Gram matrix, and which inputs are always 0."""
    gram = gram.detach().clone()
    if not gram.isfinite().all():
        raise QatkitError("sparsegpt: the inputs of the layer are NaN or infinite; calibrate on other batches")
    diagonal = gram.diagonal()
    unused = diagonal == 0
    diagonal += damp * diagonal.mean()
    diagonal[unused] += 1
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True), unused

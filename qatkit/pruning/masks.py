"""Pruning masks: boolean tensors that are True where a weight is kept, with an exact number of pruned weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.pruning.selection import NON_FINITE_ADVICE, chunks, lowest
from qatkit.pruning.shards import local, rows_here, total_counts

FLOOR = 0.001
"""Smallest fraction of a layer's weights that pruning must keep; with fewer, the layer passes almost no signal."""


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Prune the ``round(sparsity * numel)`` smallest magnitudes of one weight.

    Ties are broken by index: of equal magnitudes, the first is pruned first.

    Args:
        weight: Any shape; float32, bfloat16 or float16.
        sparsity: Fraction of pruned weights, from 0 to below 1.

    Returns:
        The mask, bool, in the weight's shape.

    Raises:
        QatkitError: the sparsity is out of range or keeps less than `FLOOR` of the weight, or a value is non-finite.

    Example:
        >>> import torch
        >>> magnitude_mask(torch.tensor([0.1, -3.0, 2.0, -0.2]), 0.5)
        tensor([False,  True,  True, False])
    """
    return global_masks({"weight": weight}, sparsity)["weight"]


def global_masks(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Prune the ``round(sparsity * numel)`` smallest magnitudes of all weights together.

    Args:
        weights: Weights by layer name. If FSDP2 has sharded them, all processes must call this function.
        sparsity: Fraction of pruned weights over all layers, from 0 to below 1.

    Returns:
        A mask for each weight; for a sharded weight, the mask of the local shard. `FLOOR` applies to all weights
        together, not to each of them; see `check_floor`.

    Raises:
        QatkitError: for the same reasons as in `magnitude_mask`.
    """
    check_sparsity("sparsity", sparsity)
    total = sum(weight.numel() for weight in weights.values())
    count = round(sparsity * total)
    check_floor(", ".join(weights), total - count, total)
    return lowest(weights, count)


def nm_mask(weight: Tensor, n: int, m: int, name: str = "weight") -> Tensor:
    """Keep the `n` largest magnitudes of every `m` consecutive inputs (N:M sparsity); ties keep the last ones.

    NVIDIA's sparse tensor cores use 2:4 (Mishra et al. 2021, https://arxiv.org/abs/2104.08378, section 3).

    Args:
        weight: ``[out, in]``, or ``[out, in, ...]`` for a convolution, with groups along the input channels.
        n: Number of weights kept in each group.
        m: Group size; must divide `in`.
        name: Name of the layer, for errors.

    Returns:
        The mask, bool, in the weight's shape; for a sharded weight, the mask of the local shard.

    Raises:
        QatkitError: `n` and `m` are not a valid pattern, `m` does not divide `in`, or a value is non-finite.

    Example:
        >>> import torch
        >>> nm_mask(torch.tensor([[0.1, -3.0, 2.0, -0.2]]), 2, 4)
        tensor([[False,  True,  True, False]])
    """
    check_nm(name, weight, n, m)
    rows = local(weight.detach()).movedim(1, -1).contiguous()
    mask = torch.empty_like(rows, dtype=torch.bool)
    non_finite = rows.new_zeros((), dtype=torch.bool)  # read once, after all chunks: one GPU sync
    for values, kept in zip(chunks(rows.view(-1), m), chunks(mask.view(-1), m), strict=True):
        groups = values.abs().view(-1, m)
        if len(groups):
            non_finite |= ~groups.amax().isfinite()
        kept.view(-1, m).copy_(_two_of_four(groups) if (n, m) == (2, 4) else _largest(groups, n))
    if non_finite:  # comparisons with NaN are all false, so fewer than n would be kept
        raise QatkitError(f"layer '{name}' has non-finite scores, which cannot be ranked", advice=NON_FINITE_ADVICE)
    return mask.movedim(-1, 1).contiguous()


def _two_of_four(groups: Tensor) -> Tensor:
    """Compute `_largest` for 2:4 by comparing each pair once: ``[groups, 4]`` is read once and written once."""
    a, b, c, d = groups.t().contiguous()
    ab, ac, ad, bc, bd, cd = a > b, a > c, a > d, b > c, b > d, c > d
    # a value is kept if it beats two of the other three; the later one wins a tie
    return torch.stack(
        [
            (ab & ac) | (ad & (ab | ac)),
            (bc & bd) | ((bc | bd) & ~ab),
            (cd & ~(ac & bc)) | ~(ac | bc),
            ~((ad & bd) | (cd & (ad | bd))),
        ],
        dim=1,
    )


def _largest(groups: Tensor, n: int) -> Tensor:
    """True at the `n` largest values of each row of ``[groups, m]``; ties go to the last."""
    order = groups.sort(dim=1, stable=True).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, groups.shape[1] - n :], True)


def block_mask(weight: Tensor, sparsity: float, block: tuple[int, int], name: str = "weight") -> Tensor:
    """Prune the ``round(sparsity * blocks)`` blocks with the smallest sums of magnitudes.

    Args:
        weight: ``[out, in]``, or ``[out, in, ...]`` for a convolution, where blocks contain whole kernels.
        sparsity: Fraction of pruned blocks, from 0 to below 1.
        block: Rows and columns of a block; they must divide `out` and `in`.
        name: Name of the layer, for errors.

    Returns:
        The mask, bool, in the weight's shape; for a sharded weight, the mask of the local shard.

    Raises:
        QatkitError: the sparsity is out of range or keeps no block, the block size does not divide the weight, or a
            value is non-finite.

    Example:
        >>> import torch
        >>> block_mask(torch.tensor([[1.0, 0.0, 2.0, 2.0]]), 0.5, (1, 2))
        tensor([[False, False,  True,  True]])
    """
    check_sparsity("sparsity", sparsity)
    check_block(name, weight, block)
    whole: Tensor = weight.detach()
    if hasattr(whole, "full_tensor"):
        whole = whole.full_tensor()  # a block may span two processes
    rows, columns = block
    out, inputs = whole.shape[:2]
    grid = whole.float().abs().flatten(2).sum(-1) if whole.dim() > 2 else whole.float().abs()
    sums = grid.view(out // rows, rows, inputs // columns, columns).sum(dim=(1, 3))
    count = round(sparsity * sums.numel())
    check_floor(name, sums.numel() - count, sums.numel())
    kept = lowest({name: sums}, count)[name]
    mask = kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    mask = mask.view(out, inputs, *[1] * (whole.dim() - 2)).expand(whole.shape)
    return rows_here(mask, weight).contiguous()


def apply_mask(tensor: Tensor, mask: Tensor) -> None:
    """Set the pruned values to exactly 0, in place, even if they are non-finite.

    Args:
        tensor: A float weight or gradient, sharded or not.
        mask: Boolean mask in the shape of the (local) tensor.
    """
    apply_masks([(tensor, mask)])


@torch.no_grad()
def apply_masks(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Call `apply_mask` on pairs of tensor and mask one after the other, with shared scratch memory."""
    # The bits are multiplied by 0 or 1: several times faster on CPU than masked_fill_ with a bool mask, and unlike
    # NaN * 0 the result is 0. All masks are widened into one scratch tensor: allocating one per chunk would cost more
    # in page faults than the arithmetic.
    scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for tensor, mask in pairs:
        part = local(tensor.detach())
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[part.element_size()]
        if not (part.is_contiguous() and mask.is_contiguous()):
            part.view(bits).mul_(mask)
            continue
        for values, kept in zip(chunks(part.view(-1)), chunks(mask.view(-1)), strict=True):
            wide = scratch.get((part.device, bits))
            if wide is None or len(wide) < len(kept):
                wide = scratch[part.device, bits] = torch.empty(len(kept), dtype=bits, device=part.device)
            values.view(bits).mul_(wide[: len(kept)].copy_(kept))


def nonzeros(weight: Tensor) -> Tensor:
    """Return the mask of a pruned weight or local shard: True where it is nonzero."""
    return local(weight.detach()).to(torch.bool)


def count_zeros(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Count the zeros of each layer's weight, over all processes if FSDP2 has sharded it."""
    here = {name: int((~nonzeros(weight)).sum()) for name, weight in weights.items()}
    return total_counts(here, weights)


def check_sparsity(key: str, sparsity: float) -> None:
    """Raise an error if `sparsity` is not a fraction from 0 to below 1."""
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise QatkitError(
            f"{sparsity!r} is out of range", key=key, advice="use a non-negative fraction below 1, such as 0.5"
        )


def check_pair(key: str, pair: object, example: tuple[int, int]) -> None:
    """Raise an error if `pair` is not two integers, for example if it is the string ``"2:4"``."""
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(number, int) for number in pair):
        raise QatkitError(f"{pair!r} is not a pair of integers", key=key, advice=f"use {example}")


def check_nm_pair(nm: tuple[int, int]) -> None:
    """Raise an error if `nm` is not a valid N:M pattern."""
    check_pair("nm", nm, (2, 4))
    if not 0 < nm[0] < nm[1]:
        raise QatkitError(
            f"{list(nm)} would keep {nm[0]} of every {nm[1]} weights", key="nm", advice="use 0 < N < M, such as [2, 4]"
        )


def check_floor(name: str, kept: int, total: int) -> None:
    """Raise an error if pruning keeps less than `FLOOR` of a layer's weights."""
    if kept < max(FLOOR * total, 1):
        raise QatkitError(
            f"layer '{name}' would keep {kept} of its {total} weights, below the floor of {FLOOR:.1%}",
            advice="use a lower sparsity or scope='layer', or exclude the layer",
        )


def check_nm(name: str, weight: Tensor, n: int, m: int) -> None:
    """Raise an error if N:M is not a valid pattern, or cannot be applied to the weight."""
    check_nm_pair((n, m))
    if weight.dim() < 2 or weight.shape[1] % m:
        raise QatkitError(
            f"groups of {m} do not divide the inputs of layer '{name}', whose weight has shape {list(weight.shape)}",
            advice="exclude the layer",
        )


def check_block(name: str, weight: Tensor, block: tuple[int, int]) -> None:
    """Raise an error if the block shape is not valid, or does not divide the weight."""
    if len(block) != 2 or min(block) < 1:
        raise QatkitError(
            f"{list(block)} is not a block shape", key="block", advice="use [rows, columns], such as [16, 16]"
        )
    if weight.dim() < 2 or weight.shape[0] % block[0] or weight.shape[1] % block[1]:
        raise QatkitError(
            f"blocks of {block[0]} x {block[1]} do not divide the weight of layer '{name}', which has shape "
            f"{list(weight.shape)}",
            advice="exclude the layer",
        )

"""Masks: which weights stay. A mask is bool, True where the weight is kept; its False are an exact count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qatkit.errors import QatkitError
from qatkit.pruning.selection import chunks, lowest
from qatkit.pruning.shards import local, rows_here, total_counts

FLOOR = 0.001
"""The least share of a layer's weights that pruning leaves; with fewer, next to nothing passes through the layer."""


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Prune the ``round(sparsity * numel)`` smallest magnitudes of one weight; of equal ones those that come first.

    Args:
        weight: Any shape; float32, bfloat16 or float16.
        sparsity: Share of zeros, from 0 to below 1.

    Returns:
        The mask, bool, in the weight's shape.

    Raises:
        QatkitError: the sparsity is out of range or leaves less than `FLOOR` of the weight, or a value is not finite.

    Example:
        >>> import torch
        >>> magnitude_mask(torch.tensor([0.1, -3.0, 2.0, -0.2]), 0.5)
        tensor([False,  True,  True, False])
    """
    return global_masks({"weight": weight}, sparsity)["weight"]


def global_masks(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Prune the ``round(sparsity * numel)`` smallest magnitudes of all weights together.

    Args:
        weights: Weights by the names of their layers; where FSDP2 sharded them, on all processes.
        sparsity: Share of zeros over all of them, from 0 to below 1.

    Returns:
        A mask for each weight; of a sharded one, the mask of the local shard. Nothing checks `FLOOR` over several
        weights: see `check_floor`.

    Raises:
        QatkitError: as for `magnitude_mask`.
    """
    check_sparsity("sparsity", sparsity)
    total = sum(weight.numel() for weight in weights.values())
    count = round(sparsity * total)
    check_floor(", ".join(weights), total - count, total)
    return lowest(weights, count)


def nm_mask(weight: Tensor, n: int, m: int, name: str = "weight") -> Tensor:
    """Keep the `n` largest magnitudes of every `m` neighbours along the inputs; of equal ones those that come last.

    2:4 is what NVIDIA's sparse tensor cores take: Mishra et al. (2021, https://arxiv.org/abs/2104.08378), section 3.

    Args:
        weight: ``[out, in]``, or ``[out, in, ...]`` of a convolution, whose neighbours are input channels.
        n: How many of each group are kept.
        m: Size of a group; divides the inputs.
        name: The layer's, for errors.

    Returns:
        The mask, bool, in the weight's shape; of a sharded weight, the mask of the local shard.

    Raises:
        QatkitError: `n` and `m` make no pattern, `m` does not divide the inputs, or a value is not finite.

    Example:
        >>> import torch
        >>> nm_mask(torch.tensor([[0.1, -3.0, 2.0, -0.2]]), 2, 4)
        tensor([[False,  True,  True, False]])
    """
    check_nm(name, weight, n, m)
    rows = local(weight.detach()).movedim(1, -1).contiguous()
    mask = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    strange = torch.zeros((), dtype=torch.bool, device=rows.device)  # read once, after all chunks: a GPU need not wait
    for values, kept in zip(chunks(rows.view(-1), m), chunks(mask.view(-1), m), strict=True):
        groups = values.abs().view(-1, m)
        if len(groups):
            strange |= ~groups.amax().isfinite()
        kept.view(-1, m).copy_(_two_of_four(groups) if (n, m) == (2, 4) else _largest(groups, n))
    if strange:  # comparisons with NaN are all false, and would keep fewer than n
        raise QatkitError(
            f"layer '{name}': values to rank are NaN or infinite; the training diverged, or the checkpoint is damaged"
        )
    return mask.movedim(-1, 1).contiguous()


def _two_of_four(groups: Tensor) -> Tensor:
    """`_largest` of two among four by comparing each pair once: ``[groups, 4]`` is read once and written once."""
    a, b, c, d = groups.t().contiguous()
    ab, ac, ad, bc, bd, cd = a > b, a > c, a > d, b > c, b > d, c > d
    # one stays where it beats two of the other three; in a tie the later one wins
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
    order = groups.sort(dim=1, stable=True).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, groups.shape[1] - n :], True)


def block_mask(weight: Tensor, sparsity: float, block: tuple[int, int], name: str = "weight") -> Tensor:
    """Prune whole blocks: the ``round(sparsity * blocks)`` with the smallest sum of magnitudes.

    Args:
        weight: ``[out, in]``, or ``[out, in, ...]`` of a convolution, whose blocks hold whole kernels.
        sparsity: Share of pruned blocks, from 0 to below 1.
        block: Rows and columns of a block; they divide `out` and `in`.
        name: What errors call the weight.

    Returns:
        The mask, bool, in the weight's shape; of a sharded weight, the mask of the local shard.

    Raises:
        QatkitError: the sparsity is out of range or leaves no block, a block does not fit, or a value is not finite.

    Example:
        >>> import torch
        >>> block_mask(torch.tensor([[1.0, 0.0, 2.0, 2.0]]), 0.5, (1, 2))
        tensor([[False, False,  True,  True]])
    """
    check_sparsity("sparsity", sparsity)
    check_block(name, weight, block)
    whole: Tensor = weight.detach()
    if hasattr(whole, "full_tensor"):
        whole = whole.full_tensor()  # a block may lie on two processes
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
    """Set the pruned values to exactly 0, in place, whatever they are: NaN and infinite ones too.

    Args:
        tensor: A weight or a gradient, float; sharded or not.
        mask: Bool, in the shape of the (local) tensor.
    """
    apply_masks([(tensor, mask)])


@torch.no_grad()
def apply_masks(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """`apply_mask` for many tensors and their masks, each taken as it comes; they share their scratch memory."""
    # bits times 0 or 1: on CPU several times faster than masked_fill_ with a bool mask, and NaN * 0 is no 0. The masks
    # are widened into one scratch tensor: a new one per chunk costs more in fresh pages than all the arithmetic
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
    """The mask that the zeros of a weight are, bool; of a sharded one, of the local shard."""
    part = local(weight.detach())
    if not part.is_contiguous():
        return part.to(torch.bool)
    mask = torch.empty(part.shape, dtype=torch.bool, device=part.device)
    for values, kept in zip(chunks(part.view(-1)), chunks(mask.view(-1)), strict=True):
        kept.copy_(values)
    return mask


def count_zeros(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """How many weights of each layer are 0; where FSDP2 sharded them, over all processes."""
    here = {name: int((~nonzeros(weight)).sum()) for name, weight in weights.items()}
    return total_counts(here, weights)


def check_sparsity(key: str, sparsity: float) -> None:
    """Raise if a share of zeros is not one."""
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise QatkitError(f"{key}: {sparsity!r} is out of range; write a share of zeros from 0 to below 1, such as 0.5")


def check_pair(key: str, pair: object, example: tuple[int, int]) -> None:
    """Raise if what should be two whole numbers is not, such as the text 2:4."""
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(number, int) for number in pair):
        raise QatkitError(f"{key}: {pair!r} is no pair of whole numbers; write {example}")


def check_nm_pair(nm: tuple[int, int]) -> None:
    """Raise if N:M is no pattern."""
    check_pair("nm", nm, (2, 4))
    if not 0 < nm[0] < nm[1]:
        raise QatkitError(f"nm: [{nm[0]}, {nm[1]}] keeps {nm[0]} of {nm[1]}; write 0 < N < M, such as [2, 4]")


def check_floor(name: str, kept: int, total: int) -> None:
    """Raise if pruning leaves a layer less than `FLOOR` of its weights."""
    if kept < max(FLOOR * total, 1):
        raise QatkitError(
            f"layer '{name}': pruning would leave {kept} of its {total} weights, below the floor of {FLOOR:.1%}; "
            "write a lower sparsity, exclude the layer, or prune by layer instead of over the model"
        )


def check_nm(name: str, weight: Tensor, n: int, m: int) -> None:
    """Raise if N:M is no pattern, or does not fit the weight."""
    check_nm_pair((n, m))
    if weight.dim() < 2 or weight.shape[1] % m:
        raise QatkitError(
            f"layer '{name}': its weight of shape {list(weight.shape)} has inputs that groups of {m} do not divide; "
            "exclude the layer"
        )


def check_block(name: str, weight: Tensor, block: tuple[int, int]) -> None:
    """Raise if blocks do not fit the weight."""
    if len(block) != 2 or min(block) < 1:
        raise QatkitError(f"block: {list(block)} is no shape of a block; write [rows, columns], such as [16, 16]")
    if weight.dim() < 2 or weight.shape[0] % block[0] or weight.shape[1] % block[1]:
        raise QatkitError(
            f"layer '{name}': blocks of {block[0]} by {block[1]} do not divide its weight of shape "
            f"{list(weight.shape)}; exclude the layer"
        )

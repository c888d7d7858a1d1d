"""Select an exact number of lowest scores over any number of tensors, without sorting or concatenation.

The bits of a float, read as an integer, sort like its magnitude, so the threshold can be found by counting. A histogram
of the high 16 bits determines its bin, and a histogram of the low 16 bits within that bin determines its value. 16-bit
floats need only the first histogram. Histograms of shards can be summed and ties are broken by index, so the masks do
not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from qatkit.errors import QatkitError
from qatkit.pruning.shards import group_of, is_sharded, local

INFINITY = {torch.float32: 0x7F80, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""The high 16 bits of infinity."""
OFFSET = 1 << 15
"""Added to the high 16 bits of signed keys, because histogram bins start at 0."""
NON_FINITE_ADVICE = "lower the learning rate if training diverged, or use another checkpoint if this one is corrupt"


@dataclass(frozen=True)
class Keys:
    """Map scores to integers that sort in the same order.

    Args:
        dtype: The dtype of all scores; if they differ, float32, which represents the other dtypes exactly.
        signed: Whether to order the scores by value; otherwise by magnitude.
    """

    dtype: torch.dtype
    signed: bool

    @property
    def wide(self) -> bool:
        """Whether a key has 32 bits."""
        return self.dtype is torch.float32

    def __call__(self, scores: Tensor) -> Tensor:
        bits, magnitude = (torch.int32, 0x7FFFFFFF) if self.wide else (torch.int16, 0x7FFF)
        if not self.signed:
            return scores.to(self.dtype).view(bits) & magnitude
        keys = (scores.to(self.dtype) + 0.0).view(bits)  # -0.0 becomes 0.0: they are equal
        return torch.where(keys < 0, keys ^ magnitude, keys)

    def high(self, scores: Tensor) -> Tensor:
        """Return the high 16 bits of the keys, shifted to start at 0."""
        keys = self(scores) >> 16 if self.wide else self(scores)
        return keys.int() + OFFSET if self.signed else keys


def lowest(scores: Mapping[str, Tensor], count: int, signed: bool = False) -> dict[str, Tensor]:
    """Find the `count` lowest of all scores; of equal scores, the first is selected first.

    Args:
        scores: Tensors of any shape by name, float32, bfloat16 or float16. If FSDP2 has sharded them, all processes
            must call this function.
        count: Number of scores to select, less than their total.
        signed: Whether to compare scores by value; the default is by magnitude.

    Returns:
        A mask for every tensor, bool: False at the selected scores. For a sharded tensor, the mask of the local shard.

    Raises:
        QatkitError: a score is non-finite, has a different dtype, or is sharded by columns.

    Example:
        >>> import torch
        >>> lowest({"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([1.0, 2.0])}, 2)
        {'a': tensor([ True, False]), 'b': tensor([False,  True])}
    """
    for name, tensor in scores.items():
        if tensor.dtype not in INFINITY:
            raise QatkitError(
                f"scores of layer '{name}' are {tensor.dtype}, which cannot be ranked",
                advice="use float32, bfloat16 or float16",
            )
    dtypes = {tensor.dtype for tensor in scores.values()}
    keys = Keys(dtypes.pop() if len(dtypes) == 1 else torch.float32, signed)
    group = group_of(scores)
    pieces = {name: local(tensor.detach()) for name, tensor in scores.items()}
    # unsharded tensors are replicated, so only the first process counts them
    counts_here = [
        group is None or is_sharded(tensor) or distributed.get_rank(group) == 0 for tensor in scores.values()
    ]
    counted = [piece.reshape(-1) for piece, here in zip(pieces.values(), counts_here, strict=True) if here]
    device = next(iter(pieces.values())).device

    high = _histogram(counted, keys.high, device, group)
    _check_finite(high, keys, scores)
    threshold, left = _bin_of(high, count)
    if keys.wide:
        first = threshold - OFFSET * signed  # the bin as the keys' own high bits

        def low(chunk: Tensor) -> Tensor:
            all_keys = keys(chunk)
            return all_keys[(all_keys >> 16) == first] & 0xFFFF

        threshold, left = _bin_of(_histogram(counted, low, device, group), left)
        threshold += first << 16
    else:
        threshold -= OFFSET * signed

    quotas = [0] * len(pieces)
    if left:
        equal = [
            sum(int((keys(chunk) == threshold).sum()) for chunk in chunks(piece.reshape(-1))) if here else 0
            for piece, here in zip(pieces.values(), counts_here, strict=True)
        ]
        quotas = _quotas(equal, [is_sharded(tensor) for tensor in scores.values()], left, device, group)
    return {
        name: _above(piece, keys, threshold, quota) for (name, piece), quota in zip(pieces.items(), quotas, strict=True)
    }


def chunks(flat: Tensor, multiple: int = 1) -> Sequence[Tensor]:
    """Split a flat tensor so that temporaries fit in a CPU cache or fill a GPU; lengths are multiples of `multiple`."""
    size = 1 << 18 if flat.device.type == "cpu" else 1 << 24
    if len(flat) <= size:  # small layers are common, and splitting into one part has a cost
        return [flat]
    return flat.split(max(size - size % multiple, multiple))  # type: ignore[no-any-return, no-untyped-call]


def _histogram(
    pieces: list[Tensor],
    digits: Callable[[Tensor], Tensor],
    device: torch.device,
    group: distributed.ProcessGroup | None,
) -> Tensor:
    """Count the values of `digits` over all pieces and processes: ``[65536]``, int64, on the CPU."""
    total = torch.zeros(1 << 16, dtype=torch.int64, device=device)
    for piece in pieces:
        for chunk in chunks(piece):
            total += torch.bincount(digits(chunk), minlength=1 << 16)
    if group is not None:
        distributed.all_reduce(total, group=group)
    return total.cpu()


def _bin_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """Find the bin of the value with this rank (from 0), and its rank within the bin."""
    cumulative = histogram.cumsum(0)
    index = int(torch.searchsorted(cumulative, rank, right=True))
    assert index < len(histogram), "count is less than the number of scores"
    return index, rank - int(cumulative[index] - histogram[index])


def _check_finite(high: Tensor, keys: Keys, scores: Mapping[str, Tensor]) -> None:
    """Raise if the histogram of the high 16 bits counts NaN or infinity."""
    infinity = INFINITY[keys.dtype]
    non_finite = (
        high[infinity + OFFSET :].sum() + high[: OFFSET - infinity].sum() if keys.signed else high[infinity:].sum()
    )
    if non_finite:
        names = [name for name, tensor in scores.items() if not local(tensor).isfinite().all()]
        raise QatkitError(
            f"layer '{(names or list(scores))[0]}' has non-finite scores, which cannot be ranked "
            f"({int(non_finite)} in total)",
            advice=NON_FINITE_ADVICE,
        )


def _quotas(
    equal: list[int], sharded: list[bool], left: int, device: torch.device, group: distributed.ProcessGroup | None
) -> list[int]:
    """Divide the `left` scores still to select, which equal the threshold, among the pieces, in the order of tensors
    and then rows."""
    rank, size = (0, 1) if group is None else (distributed.get_rank(group), distributed.get_world_size(group))
    table = torch.zeros(size, len(equal), dtype=torch.int64, device=device)
    table[rank] = torch.tensor(equal, device=device)
    if group is not None:
        distributed.all_reduce(table, group=group)
    quotas, before = [], 0
    for column, here in zip(table.t().tolist(), sharded, strict=True):
        own = rank if here else 0
        quotas.append(min(max(left - before - sum(column[:own]), 0), column[own]))
        before += sum(column)
    return quotas


def _above(piece: Tensor, keys: Keys, threshold: int, quota: int) -> Tensor:
    """Mark the scores above the threshold, and those equal to it after the first `quota`."""
    mask = torch.empty(piece.shape, dtype=torch.bool, device=piece.device)
    for chunk, part in zip(chunks(piece.reshape(-1)), chunks(mask.view(-1)), strict=True):
        chunk_keys = keys(chunk)
        torch.ge(chunk_keys, threshold, out=part)
        if quota:
            first = (chunk_keys == threshold).nonzero().flatten()[:quota]
            part[first] = False
            quota -= len(first)
    return mask

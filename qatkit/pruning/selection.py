"""Which scores are the lowest: an exact count of them over any number of tensors, without a sort or a concatenation.

The bits of a float, read as an integer, stand in the order of its magnitude, so a threshold is a question of counting:
a histogram of the high 16 bits finds the bin that it lies in, and one of the low 16 bits within this bin finds it.
16-bit floats need the first alone. Histograms of shards add up, and equal scores are told apart by their index, so any
number of processes finds the same masks.
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
"""Added to the high 16 bits of signed keys, so that a histogram can count them."""


@dataclass(frozen=True)
class Keys:
    """Reads scores as integers in the same order.

    Args:
        dtype: The one dtype of all scores; float32 where they differ, which holds the others exactly.
        signed: Whether the scores are ordered as they are; otherwise their magnitudes are.
    """

    dtype: torch.dtype
    signed: bool

    @property
    def wide(self) -> bool:
        return self.dtype is torch.float32

    def __call__(self, scores: Tensor) -> Tensor:
        bits, magnitude = (torch.int32, 0x7FFFFFFF) if self.wide else (torch.int16, 0x7FFF)
        if not self.signed:
            return scores.to(self.dtype).view(bits) & magnitude
        keys = (scores.to(self.dtype) + 0.0).view(bits)  # -0.0 becomes 0.0: they are equal
        return torch.where(keys < 0, keys ^ magnitude, keys)

    def high(self, scores: Tensor) -> Tensor:
        """The high 16 bits of the keys, from 0."""
        keys = self(scores) >> 16 if self.wide else self(scores)
        return keys.int() + OFFSET if self.signed else keys


def lowest(scores: Mapping[str, Tensor], count: int, signed: bool = False) -> dict[str, Tensor]:
    """Find the `count` lowest of all scores; among equal ones those that come first.

    Args:
        scores: Named tensors of any shapes in float32, bfloat16 or float16; where FSDP2 sharded them, on all processes.
        count: How many to select, less than there are.
        signed: Whether the scores are compared as they are; by default their magnitudes are.

    Returns:
        A mask for every tensor, bool: False at the selected scores. Of a sharded tensor, the mask of the local shard.

    Raises:
        QatkitError: a score is NaN or infinite, of another dtype, or sharded by columns.

    Example:
        >>> import torch
        >>> lowest({"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([1.0, 2.0])}, 2)
        {'a': tensor([ True, False]), 'b': tensor([False,  True])}
    """
    for name, tensor in scores.items():
        if tensor.dtype not in INFINITY:
            raise QatkitError(f"layer '{name}': {tensor.dtype} cannot be ranked; write float32, bfloat16 or float16")
    dtypes = {tensor.dtype for tensor in scores.values()}
    keys = Keys(dtypes.pop() if len(dtypes) == 1 else torch.float32, signed)
    group = group_of(scores)
    pieces = {name: local(tensor.detach()) for name, tensor in scores.items()}
    # what every process holds whole is counted by the first one
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
            found = keys(chunk)
            return found[(found >> 16) == first] & 0xFFFF

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
    """Parts of a flat tensor whose temporaries stay in a core's cache, or fill a GPU; whole multiples of a length."""
    size = 1 << 18 if flat.device.type == "cpu" else 1 << 24
    if len(flat) <= size:  # small layers are many, and a split that cuts nothing is not free
        return [flat]
    return flat.split(max(size - size % multiple, multiple))  # type: ignore[no-any-return, no-untyped-call]


def _histogram(
    pieces: list[Tensor],
    digits: Callable[[Tensor], Tensor],
    device: torch.device,
    group: distributed.ProcessGroup | None,
) -> Tensor:
    total = torch.zeros(1 << 16, dtype=torch.int64, device=device)
    for piece in pieces:
        for chunk in chunks(piece):
            total += torch.bincount(digits(chunk), minlength=1 << 16)
    if group is not None:
        distributed.all_reduce(total, group=group)
    return total.cpu()


def _bin_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the value with this rank (from 0), and its rank among the values of the bin."""
    upto = histogram.cumsum(0)
    found = int(torch.searchsorted(upto, rank, right=True))
    assert found < len(histogram), "one score at least is left over"
    return found, rank - int(upto[found] - histogram[found])


def _check_finite(high: Tensor, keys: Keys, scores: Mapping[str, Tensor]) -> None:
    infinity = INFINITY[keys.dtype]
    strange = (
        high[infinity + OFFSET :].sum() + high[: OFFSET - infinity].sum() if keys.signed else high[infinity:].sum()
    )
    if strange:
        names = [name for name, tensor in scores.items() if not local(tensor).isfinite().all()]
        raise QatkitError(
            f"layer '{(names or list(scores))[0]}': {int(strange)} of the values to rank are NaN or infinite; the "
            "training diverged, or the checkpoint is damaged"
        )


def _quotas(
    equal: list[int], sharded: list[bool], left: int, device: torch.device, group: distributed.ProcessGroup | None
) -> list[int]:
    """How many of the scores at the threshold each piece gives, in the order of tensors and then of their rows."""
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
    """True where a score is above the threshold, or equal to it and not among the first `quota` that are."""
    mask = torch.empty(piece.shape, dtype=torch.bool, device=piece.device)
    for chunk, part in zip(chunks(piece.reshape(-1)), chunks(mask.view(-1)), strict=True):
        found = keys(chunk)
        torch.ge(found, threshold, out=part)
        if quota:
            first = (found == threshold).nonzero().flatten()[:quota]
            part[first] = False
            quota -= len(first)
    return mask

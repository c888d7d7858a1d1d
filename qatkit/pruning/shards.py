"""Weights that several processes share: the part that is here, and who counts it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from qatkit.errors import QatkitError


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; the tensor itself where it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def group_of(tensors: Mapping[str, Tensor]) -> distributed.ProcessGroup | None:
    """The processes that the tensors are sharded over; None where none is.

    Raises:
        QatkitError: a tensor is sharded otherwise than by rows, or two of them over different processes.
    """
    group: distributed.ProcessGroup | None = None
    for name, tensor in tensors.items():
        for dimension in _sharded_dimensions(name, tensor):
            found = tensor.device_mesh.get_group(dimension)  # type: ignore[attr-defined]  # of a DTensor
            if group is not None and found is not group:
                raise QatkitError(
                    f"layer '{name}': its weight is sharded over other processes than the layers before it; prune them "
                    "with one callback each (include=[...])"
                )
            group = found
    return group


def rows_here(whole: Tensor, like: Tensor) -> Tensor:
    """The part of `whole`, known to every process, that belongs to this process's rows of `like`."""
    if not is_sharded(like):
        return whole
    group = group_of({"": like})
    assert group is not None
    parts = whole.chunk(distributed.get_world_size(group))
    rank = distributed.get_rank(group)
    return parts[rank] if rank < len(parts) else whole[:0]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only some rows of the tensor."""
    return bool(_sharded_dimensions("", tensor))


def _sharded_dimensions(name: str, tensor: Tensor) -> list[int]:
    placements = getattr(tensor, "placements", ())
    sharded = [(index, placement) for index, placement in enumerate(placements) if not placement.is_replicate()]
    # a strided shard (FSDP2 over tensor parallelism) is a subclass on some versions and holds rows in another order
    if len(sharded) > 1 or any(type(p).__name__ != "Shard" or p.dim != 0 for _, p in sharded):
        raise QatkitError(
            f"layer '{name}': its weight is sharded as {placements}; pruning needs shards of whole rows, as FSDP2's "
            "fully_shard makes them: exclude the layer, or set tensor_parallel_size=1"
        )
    return [index for index, _ in sharded]


def total_counts(counts: Mapping[str, int], weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Counts over the local shards of weights, summed over the processes that share them."""
    group = group_of(weights)
    if group is None:
        return dict(counts)
    # what every process holds whole is counted by the first one
    mine = [n if is_sharded(weights[name]) or distributed.get_rank(group) == 0 else 0 for name, n in counts.items()]
    total = torch.tensor(mine, device=local(next(iter(weights.values()))).device)
    distributed.all_reduce(total, group=group)
    return dict(zip(counts, total.tolist(), strict=True))

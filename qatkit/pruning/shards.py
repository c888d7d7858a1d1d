"""Sharded weights: the shard of this process, and counts over all processes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from qatkit.errors import QatkitError


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def group_of(tensors: Mapping[str, Tensor]) -> distributed.ProcessGroup | None:
    """Find the process group over which the tensors are sharded; None if no tensor is sharded.

    Raises:
        QatkitError: a tensor is not sharded by rows, or two tensors are sharded over different processes.
    """
    group: distributed.ProcessGroup | None = None
    for name, tensor in tensors.items():
        for dimension in _sharded_dimensions(name, tensor):
            own = tensor.device_mesh.get_group(dimension)  # type: ignore[attr-defined]  # of a DTensor
            if group is not None and own is not group:
                raise QatkitError(
                    f"the weight of layer '{name}' is sharded over different ranks than the layers before it",
                    advice="use one callback for each group of layers (include=[...])",
                )
            group = own
    return group


def rows_here(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's rows of `whole`, which every process has in full, with the same sharding as `like`."""
    if not is_sharded(like):
        return whole
    group = group_of({"": like})
    assert group is not None
    parts = whole.chunk(distributed.get_world_size(group))
    rank = distributed.get_rank(group)
    return parts[rank] if rank < len(parts) else whole[:0]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only some rows of the tensor."""
    return bool(_sharded_dimensions("", tensor))


def _sharded_dimensions(name: str, tensor: Tensor) -> list[int]:
    placements = getattr(tensor, "placements", ())
    sharded = [(index, placement) for index, placement in enumerate(placements) if not placement.is_replicate()]
    # in some versions a strided shard (FSDP2 over tensor parallelism) is a subclass, with its rows in a different order
    if len(sharded) > 1 or any(type(p).__name__ != "Shard" or p.dim != 0 for _, p in sharded):
        raise QatkitError(
            f"the weight of layer '{name}' is sharded as {placements}, but pruning requires shards of whole rows, as "
            "produced by FSDP2's fully_shard",
            advice="exclude the layer, or set tensor_parallel_size=1",
        )
    return [index for index, _ in sharded]


def total_counts(counts: Mapping[str, int], weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Sum the counts of local weight shards over all processes."""
    group = group_of(weights)
    if group is None:
        return dict(counts)
    # unsharded weights are replicated, so only the first process counts them
    mine = [n if is_sharded(weights[name]) or distributed.get_rank(group) == 0 else 0 for name, n in counts.items()]
    total = torch.tensor(mine, device=local(next(iter(weights.values()))).device)
    distributed.all_reduce(total, group=group)
    return dict(zip(counts, total.tolist(), strict=True))

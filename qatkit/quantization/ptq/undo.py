"""Undo: restore tensors after a method has failed midway."""

from __future__ import annotations

import torch
from torch import Tensor


class Undo:
    """Saves copies of tensors on the CPU before they are changed; calling it restores them.

    Example:
        >>> weight, undo = torch.zeros(1), Undo()
        >>> undo.keep(weight)
        >>> _ = weight.fill_(5.0)
        >>> undo()
        >>> weight
        tensor([0.])
    """

    def __init__(self) -> None:
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, *tensors: Tensor | None) -> None:
        """Save copies of tensors that are about to change; only the first copy of each tensor is kept."""
        for tensor in tensors:
            if tensor is not None and id(tensor) not in self._before:
                self._before[id(tensor)] = tensor, tensor.detach().to("cpu", copy=True)

    @torch.no_grad()
    def __call__(self) -> None:
        """Restore every tensor."""
        for tensor, before in self._before.values():
            tensor.copy_(before)

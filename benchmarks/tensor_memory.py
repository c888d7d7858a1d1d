"""Count the bytes of live tensors as torch creates and frees them, without allocator or process sizes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Within the context, track every storage that an operator returns; tensors from before are not counted.

    `peak` is the largest number of bytes that were alive at the same time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage(), known)
        self.peak = max(self.peak, self.alive)
        return out

    def _follow(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = id(storage)
        if key in known or key in self._storages:  # a view, or an operator in place
            return
        self.alive += storage.nbytes()
        self._storages[key] = weakref.ref(storage, self._gone(key, storage.nbytes()))

    def _gone(self, key: int, size: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            self.alive -= size
            del self._storages[key]

        return gone

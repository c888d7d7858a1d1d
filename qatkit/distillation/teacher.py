"""A teacher: a frozen model that only answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Teacher:
    """Runs a model in eval mode without gradients.

    Deliberately not an `nn.Module`: as an attribute of one it is never registered, so it is neither trained, saved,
    sharded nor counted.

    Args:
        model: The teacher; put into eval mode.
        device: Where it stays, such as "cuda:1"; None lets it follow the student.
        dtype: What its weights and inputs are converted to, such as `torch.bfloat16`; None leaves them as they are.
    """

    def __init__(
        self, model: nn.Module, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.model = model.eval()
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype
        if dtype is not None:
            model.to(dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.model.eval()  # a Trainer that holds it elsewhere may have switched it to train mode
        with torch.no_grad():
            return self.model(*self._fitting(args), **self._fitting(kwargs))

    def to(self, device: torch.device) -> Teacher:
        """Move the teacher's weights, unless it has a device of its own."""
        self.model.to(self.device or device)
        return self

    def _fitting(self, value: Any) -> Any:
        """Inputs where the teacher is, and in its dtype."""
        if isinstance(value, Tensor):
            return value.to(self.device, self.dtype if value.is_floating_point() else None)
        if isinstance(value, Mapping):
            return {key: self._fitting(part) for key, part in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._fitting(part) for part in value)
        return value

"""A live teacher: a frozen model that is never trained or saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Teacher:
    """Run a model in eval mode without gradients.

    It is deliberately not an `nn.Module`, so modules do not register it as a child, and it is not trained, saved,
    sharded or counted.

    Args:
        model: The teacher; switched to eval mode.
        device: The teacher's device, such as "cuda:1"; None uses the student's device.
        dtype: Dtype of the teacher's weights and inputs, such as `torch.bfloat16`; None leaves them unchanged.

    Example:
        >>> teacher = Teacher(nn.Linear(4, 2), dtype=torch.bfloat16)
        >>> teacher(torch.zeros(1, 4)).dtype, teacher(torch.zeros(1, 4)).requires_grad
        (torch.bfloat16, False)
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
        self.model.eval()  # a Trainer that holds it too may have switched it to train mode
        with torch.no_grad():
            return self.model(*self._converted(args), **self._converted(kwargs))

    def to(self, device: torch.device) -> Teacher:
        """Move the teacher to a device, unless it has its own device."""
        self.model.to(self.device or device)
        return self

    def _converted(self, value: Any) -> Any:
        """Inputs on the teacher's device and in its dtype."""
        if isinstance(value, Tensor):
            return value.to(self.device, self.dtype if value.is_floating_point() else None)
        if isinstance(value, Mapping):
            return {key: self._converted(part) for key, part in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._converted(part) for part in value)
        return value

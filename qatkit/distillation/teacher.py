"""A teacher: a frozen model that only answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Teacher:
    """Runs a model in eval mode without gradients.

    Deliberately not an `nn.Module`: as an attribute of one it is never registered, so it is neither trained, saved,
    sharded nor counted.

    Args:
        model: The teacher; put into eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.model.eval()  # a Trainer that holds it elsewhere may have switched it to train mode
        with torch.no_grad():
            return self.model(*args, **kwargs)

    def to(self, device: torch.device) -> Teacher:
        """Move the teacher's weights."""
        self.model.to(device)
        return self

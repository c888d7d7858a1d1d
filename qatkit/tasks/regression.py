"""Regression, including forecasts: values of any shape per sample."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qatkit.tasks.labels import check_same_shape, labels_of


def answers(values: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Return values and targets, flattened to ``[values]``; either may lack a last dimension of size 1."""
    targets = labels_of(batch)
    if values.dim() == targets.dim() + 1 and values.shape[-1] == 1:
        targets = targets.unsqueeze(-1)
    check_same_shape(values, targets, "one target per value")
    return values.flatten(), targets.flatten()

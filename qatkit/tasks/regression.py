"""Regression: values of any shape per sample, forecasts included."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qatkit.tasks.labels import check_same_shape, labels_of


def answers(values: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the values and their targets, flattened to ``[values]``; a last dimension of 1 may be missing in one."""
    targets = labels_of(batch)
    if values.dim() == targets.dim() + 1 and values.shape[-1] == 1:
        targets = targets.unsqueeze(-1)
    check_same_shape(values, targets, "one target per value")
    return values.flatten(), targets.flatten()

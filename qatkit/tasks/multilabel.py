"""Multi-label classification: any number of binary labels per sample."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qatkit.tasks.labels import check_same_shape, labels_of


def answers(logits: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Return logits ``[batch, labels]`` and targets of the same shape: 1, 0 or `IGNORED`."""
    targets = labels_of(batch)
    check_same_shape(logits, targets, "one target per label")
    return logits, targets

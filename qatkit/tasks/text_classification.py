"""Text classification: one class per sequence, with batches in the format of transformers models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qatkit.tasks.labels import check_shapes, labels_in


def answers(logits: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return logits ``[batch, classes]`` and labels ``[batch]``."""
    labels = labels_in(batch)
    check_shapes(logits, labels, dims=1)
    return logits, labels

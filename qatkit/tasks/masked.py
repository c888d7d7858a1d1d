"""Masked language modeling: masked tokens are predicted from all other tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qatkit.tasks.labels import check_shapes, labels_in


def answers(logits: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return logits ``[rows, vocabulary]`` and labels ``[rows]``: masked tokens, and `IGNORED` elsewhere."""
    labels = labels_in(batch)
    check_shapes(logits, labels, dims=2)
    return logits.flatten(0, 1), labels.flatten()

"""Token classification: one class per token, such as its part of speech."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qatkit.tasks.labels import check_shapes, labels_in


def answers(logits: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return logits ``[tokens, classes]`` and labels ``[tokens]``, which are `IGNORED` at tokens without a label."""
    labels = labels_in(batch)
    check_shapes(logits, labels, dims=2)
    return logits.flatten(0, 1), labels.flatten()

"""Token classification: one class per token of a text, such as its part of speech."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qatkit.tasks.labels import check_shapes, labels_in


def answers(logits: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return logits ``[tokens, classes]`` and labels ``[tokens]``, or `IGNORED` at tokens without one."""
    labels = labels_in(batch)
    check_shapes(logits, labels, dims=2)
    return logits.flatten(0, 1), labels.flatten()

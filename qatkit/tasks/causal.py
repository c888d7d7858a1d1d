"""Causal language modeling: each token is predicted from the preceding tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qatkit.tasks.labels import check_shapes, labels_in


def answers(logits: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return logits ``[rows, vocabulary]`` and labels ``[rows]``: the token after each position, or `IGNORED`."""
    labels = labels_in(batch)
    check_shapes(logits, labels, dims=2)
    return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()

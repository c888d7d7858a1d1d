"""Labels of a batch, and checks that they match the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qatkit.errors import QatkitError


def labels_in(batch: Mapping[str, Any]) -> Tensor:
    """Return the labels of a batch.

    Raises:
        QatkitError: the batch has no labels.
    """
    if "labels" not in batch:
        raise QatkitError(
            f"a batch has the keys {sorted(batch)}, but no 'labels'",
            key="data",
            advice="add 'labels' (for text, a copy of input_ids)",
        )
    labels: Tensor = batch["labels"]
    return labels


def check_shapes(logits: Tensor, labels: Tensor, dims: int) -> None:
    """Check that labels have `dims` dimensions, one label for each row of logits.

    Raises:
        QatkitError: the shapes differ.
    """
    if labels.dim() != dims or logits.shape[:-1] != labels.shape:
        raise QatkitError(
            f"labels of shape {list(labels.shape)} do not match logits of shape {list(logits.shape)}",
            key="data",
            advice="give one label per token, or one per sample",
        )
